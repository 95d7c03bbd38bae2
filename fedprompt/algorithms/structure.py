"""What a state is made of: names, shapes and types, so that a wrong one is told in one line before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedprompt.models.params import Params

DEEPEST = 16  # levels of nested dicts in a state
SETS = ("adapter.", "lora.")  # beginnings of names whose first dimension counts units


def described(tree: Any, path: str) -> dict[str, str]:
    """Type (of tensors also the shape) of everything in nested dicts and lists, by its place below ``path``.

    Raises ValueError where the nesting is deeper than ``DEEPEST``.
    """
    return dict(_walk(tree, path, DEEPEST))


def _walk(tree: Any, path: str, levels: int) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Tensor):
        yield path, _told(tree)
    elif isinstance(tree, (Mapping, list, tuple)):
        if not levels:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        items = list(tree.items() if isinstance(tree, Mapping) else enumerate(tree))
        if not items:
            yield path, f"empty {type(tree).__name__}"
        for name, value in items:
            yield from _walk(value, f"{path}.{name}", levels - 1)
    else:
        yield path, type(tree).__name__


def _told(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The first place in which two descriptions differ, and how many more there are; None where they do not."""
    differ = [path for path in {**before, **now} if before.get(path) != now.get(path)]
    if not differ:
        return None
    path, more = differ[0], len(differ) - 1
    if path not in now:
        told = f"{path} is missing"
    elif path not in before:
        told = f"{path} is not expected"
    else:
        told = f"{path} is {now[path]}, expected {before[path]}"
    return told + (f" (and {more} more)" if more else "")


def problem(params: Any, like: Params, path: str, partly: bool = False) -> str | None:
    """What is wrong with params that should be as ``like`` in names, types and shapes; None where nothing is.

    ``partly``: some names may be missing. Tensors that are sets of prompts or units may have another number of them.
    """
    if not isinstance(params, Mapping) or not all(isinstance(value, Tensor) for value in params.values()):
        return f"{path} is not a dict of tensors"
    now = {f"{path}.{name}": _told(value) for name, value in params.items()}
    expected = {f"{path}.{name}": _told(value) for name, value in like.items() if not partly or name in params}
    for name in set(params) & set(like):
        if _is_set(name) and _apart_from_number(params[name]) == _apart_from_number(like[name]):
            expected[f"{path}.{name}"] = now[f"{path}.{name}"]
    if (told := difference(expected, now)) is not None:
        return told
    unusable = [name for name, value in params.items() if not bool(torch.isfinite(value).all())]
    return f"{path}.{unusable[0]} holds infinite values or such as are no numbers" if unusable else None


def _is_set(name: str) -> bool:
    """Whether a method may change how many rows the tensor called ``name`` has."""
    return name == "pool" or name.startswith(SETS)


def _apart_from_number(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.ndim, value.shape[1:], bool(len(value) if value.ndim else 1)
