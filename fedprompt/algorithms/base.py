"""What a federated method is: a few pure functions on plain data. No I/O, no Ray, no globals.

    init(params, rng)                  -> state
    cohort(state, round, rng)          -> the clients that take part
    broadcast(state, client)           -> what that client gets
    rule(options)                      -> how it trains
    aggregate(state, updates, rng)     -> (state, metrics)

The base class is FedAvg's frame: uniform sampling, everybody gets the global params, a client keeps to itself what is
personal. A method overrides what it does differently, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedprompt.client.cohort import Update
from fedprompt.client.rules import LocalOptions, LocalRule, make_rule
from fedprompt.models.params import HEAD, Params

Metrics = dict[str, float]


@dataclass(frozen=True)
class State:
    """Everything that a federation carries from one round to the next, and so everything that a checkpoint holds.

    ``clients`` is the lazy store of what belongs to single clients: an entry appears when a client first takes part.
    ``memory`` is the method's own (server momenta, generators, ...): tensors, numbers, strings, nested dicts of them.
    """

    params: Params
    clients: dict[int, Params] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a method is told about the federation that it runs in."""

    clients: int
    cohort: int
    top_k: int = 1  # prompts that a batch takes from the pool
    pool_size: int = 1  # prompts in the pool at the start
    personal_head: bool = False


class NoSettings(BaseModel):
    """A method without settings of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Algorithm:
    """A federated method; subclasses register with ``@algorithm(name, about)``."""

    name: ClassVar[str]
    about: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("prompt", "deep", "pool", "none")  # of `prompt.kind`; the first is the default
    pooled: ClassVar[bool] = False  # one client holds everybody's data
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init__(self, settings: BaseModel, setting: Setting) -> None:
        self.settings, self.setting = settings, setting

    def is_personal(self, name: str) -> bool:
        """Whether the tensor called ``name`` stays on the client: it neither travels nor is it anybody else's."""
        return self.setting.personal_head and name.startswith(HEAD)

    def trains(self, name: str) -> bool:
        """Whether clients train the tensor called ``name``; what they do not train does not travel back."""
        return True

    def epochs(self, epochs: int) -> float:
        """Local epochs of one round."""
        return epochs

    def init(self, params: Params, rng: np.random.Generator) -> State:
        """State before the first round; what is personal has the same start for every client, whenever it begins."""
        own = {name: value for name, value in params.items() if self.is_personal(name)}
        return State(params, memory={"personal_start": own} if own else {})

    def cohort(self, state: State, round: int, rng: np.random.Generator) -> list[int]:
        """Clients of this round, by default a sample without replacement, in ascending order."""
        chosen = rng.choice(self.setting.clients, size=self.setting.cohort, replace=False)
        return sorted(int(client) for client in chosen)

    def broadcast(self, state: State, client: int) -> Params:
        """What a client starts from: the global params, and what is personal as it kept it (or as it first starts)."""
        return {**state.params, **state.memory.get("personal_start", {}), **state.clients.get(client, {})}

    def rule(self, options: LocalOptions) -> LocalRule:
        """How a client steps: by default the optimizer of the configuration."""
        return make_rule(options)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Make the next state out of the cohort's updates (in ascending order of clients, all of them finite)."""
        raise NotImplementedError

    def after_test(self, state: State, selected: np.ndarray | None) -> State:
        """Be told which prompts of the pool served the test set, bool [P]; by default nobody listens."""
        return state

    def remember(self, state: State, updates: Sequence[Update]) -> State:
        """Put what is personal in the updates into the client store."""
        kept = {
            update.client: {name: value for name, value in update.params.items() if self.is_personal(name)}
            for update in updates
        }
        return replace(state, clients={**state.clients, **{c: params for c, params in kept.items() if params}})

    def warnings(self, metrics: Metrics) -> list[str]:
        """Lines that a user should read about a round, from its metrics."""
        return []
