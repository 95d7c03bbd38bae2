"""Going on from a checkpoint: only with the configuration, data and files that the rounds so far were made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.algorithms.base import Algorithm
from fedprompt.algorithms.structure import described, difference, problem
from fedprompt.config.parsing import from_dict, load
from fedprompt.config.schema import Config
from fedprompt.data.fingerprint import Fingerprint, change
from fedprompt.errors import InputError
from fedprompt.models.params import Params
from fedprompt.runtime.checkpoints.file import INSTEAD, Checkpoint, Origin
from fedprompt.runtime.checkpoints.store import CheckpointStore, store_of
from fedprompt.seeding import Stream, generator
from fedprompt.texts import printable

# what may change without changing the rounds so far
FREE = ("federation.rounds", "federation.max_lost", "runtime.*", "tracking.*")
FREE_IN_WORDS = (
    "federation.rounds (not below the rounds done), federation.max_lost (not lower), runtime.*, tracking.*, and where "
    "the same data and weights lie"
)
ROOT = "data.root"
FILES = ("backbone.weights", "head.embeddings")  # keys that may name a file, which is compared by its content
LONGEST = 60  # characters of a value that are shown


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on: its checkpoints, the newest of them, and the files that it reads beside data."""

    store: CheckpointStore
    found: Checkpoint | None
    files: dict[str, str]

    def check_data(self, config: Config, data: Fingerprint) -> None:
        """Raise InputError where the data is not what the rounds so far were made with."""
        if self.found is not None:
            check_data(self.found, config, data)


def start_of(config: Config, output: Path) -> Start:
    """Read the newest checkpoint of a run. Raises InputError where it is one of another configuration."""
    store = store_of(config.runtime.storage, output)
    found, files = store.latest(), digests(config)
    if found is not None:
        check_config(found, config, files, store.name(found.round))
    return Start(store, found, files)


def origin_of(config: Config, data: Fingerprint, files: Mapping[str, str]) -> Origin:
    """What a checkpoint tells of the run that it belongs to."""
    return Origin(config.model_dump(mode="json"), data, dict(files))


def digests(config: Config) -> dict[str, str]:
    """Digests of the files that the configuration names, by key; data has a fingerprint of its own."""
    tree = flat(config.model_dump(mode="json"))
    named = {key: Path(tree[key]) for key in FILES if tree[key] is not None}
    return {key: _digest(path) for key, path in named.items() if path.is_file()}


def check_config(found: Checkpoint, config: Config, files: Mapping[str, str], name: str) -> None:
    """Raise InputError, naming the key, where a checkpoint was made with another configuration or other files.

    A key that the checkpoint does not know takes its default. A checkpoint of version 0.1 holds no configuration: only
    the number of its round is compared.
    """
    if found.origin is not None:
        then, now = flat(_completed(found.origin.config, config, name)), flat(config.model_dump(mode="json"))
        compared = found.origin.files.keys() & files.keys()
        differ = [key for key in {**now, **then} if _differs(key, then, now, compared)]
        if differ:
            more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
            then_and_now = f"found {_shown(now, differ[0])}, but {name} was made with {_shown(then, differ[0])}{more}"
            raise InputError(f"{differ[0]}: {then_and_now}; may change: {FREE_IN_WORDS}")
        for key, digest in found.origin.files.items():
            if files.get(key, digest) != digest:
                raise InputError(f"{key}: {now[key]} holds other content than when {name} was made; allowed: the same")
        _check_rounds(found.round, then, config)
    elif found.round > config.federation.rounds:
        raise InputError(f"federation.rounds: {config.federation.rounds}, but the run has done {found.round} rounds; "
                         f"allowed: {found.round} or more")  # fmt: skip


def changed(before: Config, now: Config) -> str | None:
    """The first key that differs between two configurations and may not change on resume; None where none does."""
    then, here = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    differ = (
        key for key in {**here, **then} if _differs(key, then, here, ()) or (key == ROOT and then[key] != here[key])
    )
    return next(differ, None)


def check_made(folder: Path, config: Config, allowed: str) -> None:
    """Raise InputError, naming the key, where the run in a folder was made with another configuration or length.

    Without a config.yaml there is nothing to compare.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    before = load(path)
    key = changed(before, config)
    if key is None and before.federation.rounds != config.federation.rounds:
        key = "federation.rounds"
    if key is not None:
        then, now = flat(before.model_dump(mode="json")), flat(config.model_dump(mode="json"))
        raise InputError(f"{key}: found {_shown(now, key)}, but {path} has {_shown(then, key)}; allowed: {allowed}")


def check_data(found: Checkpoint, config: Config, data: Fingerprint) -> None:
    """Raise InputError, naming what changed, where the data is not what a checkpoint's rounds were made with."""
    if found.origin is None:
        return
    try:
        told = change(found.origin.data, data)
    except (KeyError, TypeError, ValueError, AttributeError):
        told = "its fingerprint, which this version cannot compare"
    if told is not None:
        key, value = (ROOT, config.data.root) if config.data.root is not None else ("data.name", config.data.name)
        raise InputError(
            f"{key}: the data in '{value}' is not what the {found.round} rounds so far were made with: changed is "
            f"{printable(told, 300)}; allowed: the same data"
        )


def check_state(found: Checkpoint, algorithm: Algorithm, params: Params, config: Config, name: str) -> None:
    """Raise InputError where a checkpoint's state does not fit the model, whose first params are given."""
    state, clients = found.state, config.federation.clients
    told = problem(state.params, params, "state.params")
    for client, store in state.clients.items():
        if told is None and client >= clients:
            told = f"state.clients.{client} is not expected, there are {clients} clients"
        own = {tensor: value for tensor, value in store.items() if tensor in params}
        told = told or problem(own, params, f"state.clients.{client}", partly=True)
    if told is None and found.origin is None:  # else the file's own table of contents says so
        first = described(algorithm.init(params, generator(config.seed, Stream.INIT, 0, 1)).memory, "state.memory")
        now = described(state.memory, "state.memory")
        told = difference(first, {path: now[path] for path in now if path in first})
    if told is not None:
        raise InputError(f"{name}: {printable(told, 200)}; allowed: {INSTEAD}")


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Values of nested sections by their dotted keys."""
    return dict(_walk(tree, path))


def _walk(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _differs(key: str, then: Mapping[str, Any], now: Mapping[str, Any], compared: Collection[str]) -> bool:
    """Whether a key differs that may not; ``compared`` are keys of files that are compared by their content."""
    before, here = then.get(key), now.get(key)
    if key == "federation.max_lost":
        return float(here or 0) < float(before or 0)
    if key in FREE or f"{key.partition('.')[0]}.*" in FREE or key == ROOT:
        return False
    return before != here and key not in compared


def _completed(tree: Mapping[str, Any], config: Config, name: str) -> dict[str, Any]:
    """A checkpoint's configuration with the defaults of keys that it does not know."""
    section = tree.get("algorithm")
    method = section.get("name") if isinstance(section, Mapping) else None
    if method != config.algorithm.name:
        return {**config.model_dump(mode="json"), "algorithm": {"name": method}}
    try:
        return from_dict(dict(tree)).model_dump(mode="json")
    except InputError as error:
        raise InputError(f"{name}: its configuration cannot be read here ({error}); allowed: {INSTEAD}") from None


def _check_rounds(done: int, then: Mapping[str, Any], config: Config) -> None:
    every, rounds = config.federation.eval_every, config.federation.rounds
    scored = done % every == 0 or done == then["federation.rounds"]
    least = done if scored else done + 1  # the last round is always scored
    if rounds < least:
        raise InputError(f"federation.rounds: found {rounds}, but the run has done {done} rounds; "
                         f"allowed: {least} or more")  # fmt: skip


def _shown(tree: Mapping[str, Any], key: str) -> str:
    return printable(json.dumps(tree[key], ensure_ascii=False, default=str), LONGEST) if key in tree else "no such key"


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            state.update(part)
    return state.hexdigest()[:16]
