"""A server that remembers: what every client sent last, for methods that aggregate more than the cohort.

A cohort is a small sample of the clients, and where their data are skewed what it agrees on swings from round to round
with who is in it. The newest update of everybody else is old news, but of everybody; nobody sends anything more for it.
It costs one copy per client of what is remembered, in the server's memory and in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedprompt.algorithms.base import Metrics, State
from fedprompt.client.tasks import Update
from fedprompt.models.params import HEAD, Params, weighted_mean

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


def remembered_mean(state: State, updates: Sequence[Update]) -> tuple[State, Params, Metrics]:
    """Keep a cohort's updates; the mean by samples of the newest of every client ever heard of, and heard's metrics."""
    state, newest, metrics = heard(state, updates)
    mean = weighted_mean([update.params for update in newest], [update.samples for update in newest])
    return state, mean, metrics


def heads(updates: Sequence[Update]) -> list[Update]:
    """The updates of the head alone."""
    return [
        replace(update, params={name: value for name, value in update.params.items() if name.startswith(HEAD)})
        for update in updates
    ]


def _entry(update: Update) -> dict[str, Any]:
    return {"samples": update.samples, "params": dict(update.params), "age": 0}


def _update(client: int, entry: dict[str, Any]) -> Update:
    return Update(client, entry["samples"], 0, entry["params"], None, 0.0)
