"""How much memory a run will take, estimated from its settings before anything is allocated.

Counted is what grows with settings: the backbone, what the clients train that train at once, with gradients and
moments, one batch's activations, images as the backbone takes them, prepared features, and the models that clients own.
The data, a method's other memory and what libraries need are not. So what is refused cannot fit; the rest may not fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedprompt.algorithms import registry
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.errors import InputError
from fedprompt.models.backbones.base import AT_ONCE as CHUNK
from fedprompt.models.kinds.registry import KINDS
from fedprompt.runtime.build import outline_backbone

FLOAT = 4  # bytes
TRAINED = 4  # copies of what a client trains: values, gradients and the two moments of Adam
KEPT = 10  # numbers per width that a frozen block keeps of a token for gradients, at least: in attention, MLP, norms
USED = 8  # the same where no gradients are needed, in one block at a time
AT_ONCE = ("runtime.group_size", "federation.cohort")
BATCH = ("local.batch_size", *AT_ONCE)
DEFAULTS = Config()
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Need:
    """A part of a run's memory: the settings that it grows with, its bytes, and what they hold."""

    keys: tuple[str, ...]
    bytes: float
    what: str


@dataclass(frozen=True)
class Outline:
    """Sizes of the backbone: width, blocks, tokens per sample, and numbers in its weights."""

    width: int
    depth: int
    tokens: int
    weights: int


@dataclass(frozen=True)
class Samples:
    """Numbers of the data: classes, images of all splits, and samples of the largest client and test set."""

    classes: int
    images: int
    client: int
    tested: int


def check_memory(config: Config, data: FederatedData, room: int | None = None) -> None:
    """Raise InputError where a run needs more than ``room`` bytes (left out: what this machine has).

    The line names what needs most of it, the setting that is farthest above its default first, and both sizes.
    """
    backbone = outline(config)
    images = len(data.train) + len(data.validation) + len(data.test)
    samples = Samples(len(data.class_names), images, int(max(data.sizes)), max(len(data.test), len(data.validation)))
    room, parts = machine_bytes() if room is None else room, needs(config, backbone, samples)
    total = sum(part.bytes for part in parts)
    if total > room:
        most = max(parts, key=lambda part: part.bytes)
        key = max(most.keys, key=lambda key: _times_default(config, key))
        others = "".join(f", {other} = {_value(config, other)}" for other in most.keys if other != key)
        raise InputError(
            f"{key}: {_value(config, key)} needs {_mb(most.bytes)} of memory for {most.what}{others and ' with'}"
            f"{others[1:]} (the whole run: {_mb(total)}); allowed: what fits into the {_mb(room)} here"
        )


def outline(config: Config) -> Outline:
    """Return the backbone's sizes, all of them 0 where it is behind a service elsewhere.

    Raises InputError where there is no such backbone, or ``prompt.kind`` does not go with it.
    """
    if config.is_blackbox and config.blackbox.address is not None:
        return Outline(0, 0, 0, 0)
    with torch.random.fork_rng(devices=[]):
        backbone = outline_backbone(config)
    weights = sum(p.numel() for p in backbone.weights().values())
    return Outline(backbone.width, backbone.depth, backbone.tokens_per_sample, weights)


def needs(config: Config, backbone: Outline, samples: Samples) -> list[Need]:
    """Return the parts of a run's memory, in one process."""
    return [
        Need(("backbone.name",), backbone.weights * FLOAT, "its weights"),
        *_trained(config, backbone, samples),
        *_activations(config, backbone, samples),
        Need(("runtime.cache_mb", "backbone.image_size"), _prepared(config, backbone, samples), "tokens of all images"),
    ]


def machine_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in LIMITS:
        text = path.read_text().strip() if path.exists() else "max"
        limits += [int(text)] if text.isdigit() else []
    return min(limits)


def _trained(config: Config, backbone: Outline, samples: Samples) -> Iterator[Need]:
    """Parameters of the clients that train at once, of a cohort's updates, or of all clients where they own them."""
    federation, at_once = config.federation, _at_once(config)
    key, added = _added(config, backbone)
    head = _head(config, backbone, samples)
    yield Need((key, *AT_ONCE), TRAINED * at_once * added * FLOAT, "what clients train, with gradients and moments")
    yield Need(("head.hidden", *AT_ONCE), TRAINED * at_once * head * FLOAT, "heads, with gradients and moments")
    owns = registry.get(config.algorithm.name).averaged_model
    who, models = ("clients", federation.clients) if owns else ("cohort", federation.cohort)
    yield Need((f"federation.{who}", key, "head.hidden"), models * (added + head) * FLOAT, f"models of the {who}")
    if config.local.optimizer == "cma":
        yield Need(("prompt.channels",), 2 * 8 * added**2, "the covariances of CMA-ES")


def _activations(config: Config, backbone: Outline, samples: Samples) -> Iterator[Need]:
    """What one batch keeps for its gradients, and images on their way through the backbone."""
    rows = _at_once(config) * min(config.local.batch_size, samples.client)
    first = 0 if config.prompt.kind in ("visual", "full") else config.prompt.layer
    blocks = 0 if config.is_blackbox or config.prompt.kind == "none" else max(1, backbone.depth - first)
    per_token = backbone.width * FLOAT
    kept, used = rows * blocks * KEPT, min(config.local.batch_size, samples.tested) * USED
    yield Need((*BATCH, "backbone.image_size"), max(kept, used) * backbone.tokens * per_token, "a batch's activations")
    yield Need(("head.hidden", *BATCH), 3 * rows * _hidden(config) * FLOAT, "a batch's hidden units")
    if KINDS.get(config.prompt.kind).holds_tokens:
        key = "prompt.top_k" if config.prompt.kind == "pool" else "prompt.length"
        inserted = config.prompt.top_k if config.prompt.kind == "pool" else config.prompt.length
        yield Need((key, *BATCH), max(kept, used) * inserted * per_token, "activations at the prompts of a batch")
    pixels = 2 * 3 * (config.backbone.image_size / config.backbone.crop) ** 2
    size = pixels * FLOAT + USED * backbone.tokens * per_token
    yield Need(("backbone.image_size", "backbone.crop"), CHUNK * size, f"{CHUNK} images as pixels and tokens")


def _prepared(config: Config, backbone: Outline, samples: Samples) -> float:
    """Bytes of the tokens that are kept, which are none where ``runtime.cache_mb`` has no room for them."""
    wanted = samples.images * backbone.tokens * backbone.width * FLOAT
    is_kept = config.prompt.layer > 0 and config.prompt.kind not in ("visual", "full")
    return wanted if is_kept and wanted <= config.runtime.cache_mb * 2**20 else 0


def _added(config: Config, backbone: Outline) -> tuple[str, int]:
    """The setting that decides how many numbers a client trains beside the head, and how many."""
    prompt, width = config.prompt, backbone.width
    blocks = max(1, backbone.depth - prompt.layer)
    known = {
        "prompt": ("prompt.length", prompt.length * width),
        "deep": ("prompt.length", prompt.length * width * blocks),
        "pool": ("prompt.pool_size", prompt.pool_size * width + width**2),
        "adapter": ("prompt.rank", 2 * prompt.rank * width * blocks),
        "lora": ("prompt.rank", 4 * prompt.rank * width * blocks),
        "visual": ("prompt.channels", prompt.channels * (9 * (2 * prompt.channels + 6) + 36)),
        "full": ("backbone.name", backbone.weights),
        "none": ("prompt.length", 0),
    }
    return known.get(prompt.kind, ("prompt.length", 0))  # of other packages' kinds nothing is known


def _head(config: Config, backbone: Outline, samples: Samples) -> int:
    sizes = {"mlp": _hidden(config) * (backbone.width + samples.classes), "linear": backbone.width * samples.classes}
    return sizes.get(config.head.kind, 0)


def _hidden(config: Config) -> int:
    return config.head.hidden if config.head.kind == "mlp" else 0


def _at_once(config: Config) -> int:
    """Clients whose training shares a batch."""
    return min(config.runtime.group_size, config.federation.cohort)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _times_default(config: Config, key: str) -> float:
    """How many times its default a setting is; 1 for a name."""
    value, default = _value(config, key), _value(DEFAULTS, key)
    if isinstance(value, str):
        return 1
    return default / value if key == "backbone.crop" else value / default


def _mb(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"
