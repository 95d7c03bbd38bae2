"""A server that remembers: what every client sent last, for methods that aggregate more than the cohort.

A cohort is a small sample of the clients, and where their data are skewed what it agrees on swings from round to round
with who is in it. The newest update of everybody else is old news, but of everybody; nobody sends anything more for it.
It costs one copy of what travels per client, in the server's memory and in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedprompt.algorithms.base import Metrics, State
from fedprompt.client.tasks import Update
from fedprompt.models.params import Params

NEWEST = "newest"  # in the state's memory: by client, what it sent last and how many rounds ago


def heard(state: State, updates: Sequence[Update]) -> tuple[State, list[Update], Metrics]:
    """Keep a cohort's updates; return the newest of every client ever heard of, in ascending order of clients.

    Metrics: ``remembered``, how many these are, and ``age``, how many rounds ago they were sent on average.
    """
    before = state.memory.get(NEWEST, {})
    entries = {client: {**entry, "age": entry["age"] + 1} for client, entry in before.items()}
    entries |= {str(update.client): _entry(update) for update in updates}
    entries = {client: entries[client] for client in sorted(entries, key=int)}
    newest = [_update(int(client), entry) for client, entry in entries.items()]
    ages = [entry["age"] for entry in entries.values()]
    metrics = {"remembered": float(len(newest)), "age": sum(ages) / len(ages)}
    return replace(state, memory={**state.memory, NEWEST: entries}), newest, metrics


def changed(state: State, params: Sequence[Params], selected: Sequence[Tensor]) -> State:
    """Write what is remembered of the clients anew, in their order: after a pool has been put into another order."""
    entries = state.memory[NEWEST]
    new = {
        client: {**entry, "params": own, "selected": chosen}
        for (client, entry), own, chosen in zip(entries.items(), params, selected, strict=True)
    }
    return replace(state, memory={**state.memory, NEWEST: new})


def _entry(update: Update) -> dict[str, Any]:
    selected = {} if update.selected is None else {"selected": update.selected}
    return {"samples": update.samples, "params": dict(update.params), **selected, "age": 0}


def _update(client: int, entry: dict[str, Any]) -> Update:
    return Update(client, entry["samples"], 0, entry["params"], entry.get("selected"), 0.0)
