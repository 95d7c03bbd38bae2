"""What can be wrong with a method's answers: a fault is the text "found …; allowed: …", and "" where there is none."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms.base import TRAFFIC, State
from fedprompt.errors import shown
from fedprompt.models.params import Params

_PLAIN = (bool, int, float, str, type(None))  # what a checkpoint can hold beside tensors, these exact types


def fault_of_cohort(chosen: Any, clients: int) -> str:
    """A cohort is different clients, by number."""
    allowed = f"different whole numbers from 0 to {clients - 1}"
    try:
        numbers = [operator.index(client) for client in chosen]
    except TypeError:
        return f"found {_short(chosen)}; allowed: {allowed}"
    wrong = [client for client in numbers if not 0 <= client < clients or numbers.count(client) > 1]
    return f"found {_short(wrong[0])} among {_short(numbers)}; allowed: {allowed}" if wrong else ""


def fault_of_epochs(epochs: Any) -> str:
    """Local epochs are finite and not negative."""
    good = isinstance(epochs, (int, float, np.number)) and 0 <= epochs < math.inf
    return "" if good else f"found {_short(epochs)}; allowed: a number from 0"


def fault_of_tensors(named: Any) -> str:
    """Tensors by name."""
    if not isinstance(named, dict):
        return f"found {_short(named)}; allowed: a dict of named tensors"
    wrong = [name for name, value in named.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    return f"found {_short(named[wrong[0]])} under {wrong[0]!r}; allowed: tensors, by name" if wrong else ""


def fault_of_params(params: Any, like: Params, resizes: Callable[[str], bool] = lambda name: False) -> str:
    """Params have the names, types and shapes of ``like``; of what ``resizes`` names the number of rows is free."""
    if fault := fault_of_tensors(params):
        return fault
    if missing := [name for name in like if name not in params]:
        return f"found no {', '.join(missing)} among the params; allowed: all of {', '.join(like)}"
    if unknown := [name for name in params if name not in like]:
        return f"found {', '.join(unknown)} among the params; allowed: {', '.join(like)}"
    for name, value in like.items():
        own = params[name]
        rows = len(own) if resizes(name) and own.ndim and len(own) else len(value) if value.ndim else 0
        if own.dtype != value.dtype or own.shape != (
            torch.Size([rows, *value.shape[1:]]) if value.ndim else value.shape
        ):
            return f"found {name} as {_form(own)}; allowed: {_form(value)}"
    return ""


def fault_of_state(state: Any, before: State, resizes: Callable[[str], bool], clients: int) -> str:
    """A state has the params of the one ``before``, stores of clients that there are, and memory that can be saved."""
    if not isinstance(state, State):
        return f"found {_short(state)} for a state; allowed: a State"
    if fault := fault_of_params(state.params, before.params, resizes):
        return fault
    if not isinstance(state.clients, dict):
        return f"found {_short(state.clients)} for the clients' stores; allowed: a dict by client"
    for client, store in state.clients.items():
        if type(client) is not int or not 0 <= client < clients:
            return f"found a store of client {client!r}; allowed: whole numbers from 0 to {clients - 1}"
        if store is not before.clients.get(client) and (fault := fault_of_tensors(store)):
            return f"{fault}, in the store of client {client}"
    return fault_of_memory(state.memory)


def fault_of_memory(memory: Any, name: str = "memory") -> str:
    """A method's memory is what a checkpoint can hold, and read back without executing anything."""
    if isinstance(memory, Tensor) or (type(memory) in _PLAIN and name != "memory"):
        return ""
    if isinstance(memory, dict):
        keys = [key for key in memory if type(key) not in (str, int)]
        wrong = [f"found the key {key!r} in {name}; allowed: texts and whole numbers" for key in keys]
        wrong += filter(None, (fault_of_memory(value, f"{name}[{key!r}]") for key, value in memory.items()))
        return wrong[0] if wrong else ""
    if type(memory) in (list, tuple) and name != "memory":
        faults = filter(None, (fault_of_memory(value, f"{name}[{i}]") for i, value in enumerate(memory)))
        return next(faults, "")
    kind, allowed = type(memory).__name__, "tensors, numbers, texts, and lists and dicts of them"
    return f"found {_short(memory)}, a {kind}, as {name}; allowed: {allowed}"


def fault_of_metrics(metrics: Any) -> str:
    """Metrics are numbers by name; those of traffic are finite."""
    if not isinstance(metrics, Mapping):
        return f"found {_short(metrics)} for metrics; allowed: a dict of numbers"
    for name, value in metrics.items():
        number = isinstance(value, (int, float, np.number)) or (isinstance(value, Tensor) and value.numel() == 1)
        if not isinstance(name, str) or not number:
            return f"found {_short(value)} for the metric {name!r}; allowed: a number"
        if name in TRAFFIC and not 0 <= float(value) < math.inf:
            return f"found {_short(value)} for the metric {name!r}; allowed: a number from 0"
    return ""


def fault_of_lines(lines: Any) -> str:
    """Warnings are lines of text."""
    good = isinstance(lines, (list, tuple)) and all(isinstance(line, str) for line in lines)
    return "" if good else f"found {_short(lines)}; allowed: a list of lines"


def not_finite(state: State, before: State) -> str:
    """Name a tensor of the state that holds an infinity or no number, clients' stores from ``before`` left out."""
    new = {client: store for client, store in state.clients.items() if store is not before.clients.get(client)}
    parts = {"params": state.params, "clients": new, "memory": state.memory}
    return next((name for name, value in _tensors(parts, "") if not torch.isfinite(value).all()), "")


def _tensors(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}[{key!r}]" if name else str(key))


def _short(value: Any) -> str:
    return _form(value) if isinstance(value, Tensor) else shown(value)


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
