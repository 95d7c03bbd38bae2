"""Settings that do not go together, though each of them is allowed: refused with one line, before anything begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedprompt.blackbox.access import check_address
from fedprompt.client.rules.registry import LOCAL_RULES, with_gradients
from fedprompt.data.partitions.registry import PARTITIONS
from fedprompt.errors import InputError
from fedprompt.models.heads.registry import HEADS
from fedprompt.models.kinds.registry import KINDS
from fedprompt.tracking.registry import TRACKERS

if TYPE_CHECKING:
    from fedprompt.algorithms.base import Algorithm
    from fedprompt.config.schema import Config

LEAST_SHARE = 0.01  # of a GPU, for one worker


def check(config: Config, algorithm: type[Algorithm]) -> None:
    """Raise InputError, naming the key, what was found and what is allowed, for the first thing that does not fit."""
    _check_names(config)
    _check_goes_with("prompt.kind", config.prompt.kind, config, algorithm.kinds)
    _check_goes_with("local.optimizer", config.local.optimizer, config, algorithm.optimizers)
    if not algorithm.takes_momentum:
        _check_goes_with("local.momentum", config.local.momentum, config, (0,))
    _check_blackbox(config)
    if not HEADS.get(config.head.kind).thing.is_trained:
        _check_untrained_head(config)
    _check_sizes(config)
    if algorithm.pooled:
        _check_goes_with_one_client(config)


def _check_names(config: Config) -> None:
    """Refuse names that are not registered."""
    PARTITIONS.get(config.partition.kind)
    KINDS.get(config.prompt.kind)
    HEADS.get(config.head.kind)
    LOCAL_RULES.get(config.local.optimizer)
    names = config.tracking.trackers
    for name in names:
        TRACKERS.get(name)
        if names.count(name) > 1:
            raise InputError(f"tracking.trackers: '{name}' is there twice; allowed: each name once")


def _check_goes_with(key: str, value: str | float | None, config: Config, allowed: Sequence[str | float]) -> None:
    if value not in allowed:
        raise InputError(
            f"{key}: {value!r} does not go with algorithm.name = '{config.algorithm.name}'; "
            f"allowed: {', '.join(map(str, allowed))}"
        )


def _check_blackbox(config: Config) -> None:
    """Refuse what the service behind a black box does not have, or cannot do."""
    if config.blackbox.address is not None:
        check_address(config.blackbox.address)
    if config.blackbox.address is not None and config.blackbox.budget is not None:
        raise InputError(
            f"blackbox.budget: {config.blackbox.budget} does not go with blackbox.address, whose service has its own; "
            "allowed: null"
        )
    prompt, head, optimizer = config.prompt.kind, config.head.kind, config.local.optimizer
    if config.is_blackbox and config.local.rho:
        raise InputError(f"local.rho: {config.local.rho} needs gradients, and '{optimizer}' has none; allowed: 0")
    if config.is_blackbox and (prompt, head) != ("visual", "prototypes"):
        raise InputError(
            f"local.optimizer: '{optimizer}' asks a black-box model, which knows prompt.kind = visual and head.kind = "
            f"prototypes, not {prompt} and {head}; allowed with those: {', '.join(with_gradients('adam'))}"
        )


def _check_untrained_head(config: Config) -> None:
    """Refuse heads without anything to train unless the kind is made for one, or where the head is what it is about."""
    prompt, head = config.prompt.kind, config.head
    alone = [entry.name for entry in KINDS.available() if not HEADS.get(entry.head).thing.is_trained]
    if prompt not in alone:
        trained = ", ".join(entry.name for entry in HEADS.available() if entry.thing.is_trained)
        raise InputError(
            f"head.kind: '{head.kind}' goes with prompt.kind = {' or '.join(alone)}, not {prompt}; allowed: {trained}"
        )
    if head.personal:
        raise InputError(f"head.personal: true needs a trained head, and head.kind is {head.kind}; allowed: false")


def _check_sizes(config: Config) -> None:
    """Refuse what is too large, too small or too early for something else."""
    federation, prompt, runtime = config.federation, config.prompt, config.runtime
    if federation.cohort > federation.clients:
        raise InputError(
            f"federation.cohort: {federation.cohort} is larger than federation.clients = {federation.clients}; "
            f"allowed: 1 to {federation.clients}"
        )
    if KINDS.get(prompt.kind).holds_tokens and prompt.init == "class" and prompt.layer == 0:
        raise InputError(
            "prompt.init: 'class' does not go with prompt.layer = 0, before which the class token is the same for all "
            "images; allowed: uniform, patches"
        )
    if prompt.kind == "pool" and prompt.top_k > prompt.pool_size:
        raise InputError(
            f"prompt.top_k: {prompt.top_k} is larger than prompt.pool_size = {prompt.pool_size}; "
            f"allowed: 1 to {prompt.pool_size}"
        )
    if any(not 0 <= beta < 1 for beta in config.local.betas):
        raise InputError(f"local.betas: {list(config.local.betas)}; allowed: two numbers from 0 to below 1")
    gpus = runtime.gpus_per_worker
    if gpus and (gpus < LEAST_SHARE or (gpus > 1 and gpus % 1)):
        raise InputError(
            f"runtime.gpus_per_worker: {gpus}; allowed: 0, a fraction from {LEAST_SHARE} to 1, or a whole number"
        )


def _check_goes_with_one_client(config: Config) -> None:
    """Refuse what only means something where there are several clients."""
    settings = {
        "head.personal": (config.head.personal, False),
        "federation.dropout": (config.federation.dropout, 0),
        "federation.deadline": (config.federation.deadline, None),
    }
    for key, (found, allowed) in settings.items():
        if found != allowed:
            name, found, allowed = config.algorithm.name, json.dumps(found), json.dumps(allowed)
            raise InputError(
                f"{key}: {found} does not go with algorithm.name = '{name}', which has one client; allowed: {allowed}"
            )
