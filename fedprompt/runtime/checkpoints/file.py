"""The content of one checkpoint file: what goes in, and what is checked before anything of it is believed."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedprompt.algorithms.base import State
from fedprompt.algorithms.memory import NEWEST
from fedprompt.algorithms.structure import described, difference
from fedprompt.data.fingerprint import Fingerprint
from fedprompt.errors import InputError
from fedprompt.models.weights.torch_files import load_plain
from fedprompt.texts import printable

FIRST_PARTS = ("round", "state", "totals")  # all that version 0.1 wrote
PARTS = (*FIRST_PARTS, "origin", "best", "first_line", "contents")
LONGEST = 200  # characters about what is wrong
INSTEAD = "a checkpoint as the run wrote it; without this file --resume takes the one before, --overwrite begins anew"


@dataclass(frozen=True)
class Origin:
    """What a run is made of.

    ``config`` is the complete configuration as nested plain values, ``data`` the data set's fingerprint, ``files`` the
    digests of other files that the configuration names, by key.
    """

    config: dict[str, Any]
    data: Fingerprint
    files: dict[str, str]


@dataclass(frozen=True)
class Best:
    """The best round on validation so far: its numbers as in result.json, and what its models are made of.

    ``state`` is None where the store has it already.
    """

    numbers: dict[str, Any]
    state: State | None = None

    @property
    def round(self) -> int:
        """Its number."""
        return self.numbers["round"]


@dataclass(frozen=True)
class Checkpoint:
    """A federation after ``round`` rounds. ``totals`` are sums over the rounds so far (bytes, seconds).

    ``first_line`` is the first round that metrics.jsonl tells of. ``origin`` is None in a file of version 0.1, which
    holds neither configuration nor fingerprint.
    """

    round: int
    state: State
    totals: dict[str, float] = field(default_factory=dict)
    origin: Origin | None = None
    best: Best | None = None
    first_line: int = 0


def models_of(state: State) -> State:
    """What clients' models are made of, without what rules and a server's memory of old updates need to go on."""
    clients = {client: _named_as(store, state.params) for client, store in state.clients.items()}
    return State(
        state.params,
        {client: store for client, store in clients.items() if store},
        {name: value for name, value in state.memory.items() if name != NEWEST},
    )


def _named_as(store: dict[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in store.items() if name in params}


def encoded(checkpoint: Checkpoint) -> bytes:
    """A checkpoint as the bytes of a file; its table of contents shows later whether anything was lost."""
    state, origin, best = checkpoint.state, checkpoint.origin, checkpoint.best
    tree = _owned({"params": state.params, "clients": state.clients, "memory": state.memory})
    content: dict[str, Any] = {
        "round": checkpoint.round,
        "state": tree,
        "totals": checkpoint.totals,
        "origin": None if origin is None else {"config": origin.config, "data": origin.data, "files": origin.files},
        "best": None if best is None else best.numbers,
        "first_line": checkpoint.first_line,
        "contents": described(tree, "state"),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _owned(tree: Any) -> Any:
    """The same values; tensors that repeat a smaller storage, as ``expand`` makes them, get one of their own."""
    if isinstance(tree, Tensor):
        return tree if _holds_its_values(tree) else tree.clone(memory_format=torch.contiguous_format)
    return {name: _owned(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


def _holds_its_values(value: Tensor) -> bool:
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def raw(data: bytes) -> Any:
    """Unpack a file without executing anything in it; raises something else than InputError where it is damaged."""
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ValueError("not a whole zip archive")
    return load_plain(io.BytesIO(data))


def decoded(content: Any, name: str, round: int | None) -> Checkpoint:
    """Make a checkpoint of what ``raw`` returned; ``round`` is the one that the file's name tells, if any.

    Raises InputError with one line where a part is missing, too much or of another type than was written.
    """
    try:
        return _checked(content, round)
    except ValueError as error:
        raise InputError(f"{name}: {printable(str(error), LONGEST)}; allowed: {INSTEAD}") from None


def _checked(content: Any, round: int | None) -> Checkpoint:
    content = _dict(content, "its content")
    of_first_version = content.keys() <= set(FIRST_PARTS)
    for part in (*(FIRST_PARTS if of_first_version else PARTS), *content):
        if part not in content or part not in PARTS:
            raise ValueError(f"{part} is {'missing' if part not in content else 'not expected'}")
    found = _count(content["round"], "round")
    if round is not None and found != round:
        raise ValueError(f"it holds round {found}, which is not that of its name")
    tree = _dict(content["state"], "state", ("params", "clients", "memory"))
    now = described(tree, "state")
    if (told := difference(_dict(content.get("contents", now), "contents"), now)) is not None:
        raise ValueError(told)
    _params(tree["params"], "state.params")
    for client, store in _dict(tree["clients"], "state.clients").items():
        _count(client, "a client's number in state.clients")
        _params(store, f"state.clients.{client}")
    _dict(tree["memory"], "state.memory")
    _check_sizes(tree)
    return Checkpoint(
        found,
        State(tree["params"], tree["clients"], tree["memory"]),
        _totals(content["totals"]),
        _origin(content.get("origin")),
        _best(content.get("best"), found),
        _count(content.get("first_line", 0), "first_line"),
    )


def _check_sizes(tree: Any) -> None:
    for value in tree.values():
        if isinstance(value, dict):
            _check_sizes(value)
        elif isinstance(value, Tensor) and not _holds_its_values(value):
            raise ValueError(f"a tensor of shape {list(value.shape)} has fewer values than that")


def _origin(tree: Any) -> Origin | None:
    if tree is None:
        return None
    parts = _dict(tree, "origin", ("config", "data", "files"))
    return Origin(*(_dict(parts[name], f"origin.{name}") for name in ("config", "data", "files")))


def _best(numbers: Any, round: int) -> Best | None:
    if numbers is None:
        return None
    found = Best(_dict(numbers, "best", ("round", "validation_accuracy")))
    if not 0 < _count(found.round, "best.round") <= round:
        raise ValueError(f"best.round is {found.round}, expected 1 to {round}")
    return found


def _totals(tree: Any) -> dict[str, float]:
    totals = _dict(tree, "totals")
    for name, value in totals.items():
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not isinstance(name, str) or not usable:
            raise ValueError(f"totals.{name} is {_shown(value)}, expected a number")
    return totals


def _params(tree: Any, path: str) -> None:
    for name, value in _dict(tree, path).items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}.{name} is a {type(value).__name__}, expected a tensor with a name")


def _dict(tree: Any, path: str, keys: tuple[str, ...] = ()) -> dict[Any, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is {_shown(tree)}, expected a dict")
    for key in keys:
        if key not in tree:
            raise ValueError(f"{path}.{key} is missing")
    return tree


def _count(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{path} is {_shown(value)}, expected a whole number from 0")
    return value


def _shown(value: Any) -> str:
    text = f"{value!r}" if isinstance(value, (int, float, str)) and not _is_long(value) else ""
    return f"{text[:40]} ({type(value).__name__})" if text else f"a {type(value).__name__}"


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and value.bit_length() > 128
