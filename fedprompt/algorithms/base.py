"""What a federated method is: a few pure functions on plain data. No I/O, no Ray, no globals.

    init(params, rng)                  -> state
    cohort(state, round, rng)          -> the clients that take part
    broadcast(state, client)           -> what that client starts from
    send(state, client)                -> what its rule gets besides
    rule(options, round)               -> how it trains
    aggregate(state, updates, rng)     -> (state, metrics)

The base class is FedAvg's frame: uniform sampling, everybody gets the global params, a client keeps to itself what is
personal. A method overrides what it does differently, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from fedprompt.client.rules.base import LocalOptions, LocalRule
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Update
from fedprompt.config.schema import Section
from fedprompt.models.params import HEAD, Params, is_finite, weighted_mean
from fedprompt.registry import AnyOf

Metrics = dict[str, float]
RULE = "rule."  # prefix, in a client's store, of what its rule left there
TRAFFIC = ("up_bytes", "down_bytes", "messages")  # of an aggregation's metrics: what clients sent each other


@dataclass(frozen=True)
class State:
    """Everything that a federation carries from one round to the next, and so everything that a checkpoint holds.

    ``clients`` is the lazy store of what belongs to single clients: an entry appears when a client first takes part. It
    holds the client's personal params and, with a prefix, what its rule left behind (controls, moments, ...).
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
    rank: int = 1  # units of an adapter, or of LoRA, at the start
    personal_head: bool = False
    constants: tuple[str, ...] = ()  # names of tensors that stay as the run's seed draws them


class MethodSettings(Section):
    """Base of every method's own settings: no unknown keys, no infinity, no changes once they are read."""


class NoSettings(MethodSettings):
    """A method without settings of its own."""


# Limits that no sensible experiment reaches: beyond them numbers overflow in float32, or memory ends.
Rate = Annotated[float, Field(gt=0, le=1e30)]
Weight = Annotated[float, Field(ge=0, le=1e30)]
Positive = Annotated[float, Field(ge=1e-12, le=1e12)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Algorithm:
    """A federated method; subclasses register with ``@algorithm(name, about, source)``."""

    name: ClassVar[str]
    about: ClassVar[str]
    source: ClassVar[str] = ""  # the paper
    kinds: ClassVar[Sequence[str]] = AnyOf("kinds", "prompt")  # of `prompt.kind`; the first is the default
    optimizers: ClassVar[Sequence[str]] = AnyOf("local_rules", "adam")  # of `local.optimizer`, likewise
    momentum: ClassVar[float] = 0.0  # default of `local.momentum`
    takes_momentum: ClassVar[bool] = True  # whether it may be anything else
    rho: ClassVar[float] = 0.0  # default of `local.rho`
    pooled: ClassVar[bool] = False  # one client holds everybody's data
    averaged_model: ClassVar[bool] = False  # clients own all params, and the state's are their mean: it is scored, too
    needs_only_mean: ClassVar[bool] = False  # of the updates, by samples: workers may then send their groups' means
    Settings: ClassVar[type[BaseModel]] = NoSettings

    def __init_subclass__(cls) -> None:
        if "aggregate" in vars(cls) and "needs_only_mean" not in vars(cls):
            cls.needs_only_mean = False  # what holds of a method need not hold of one that is derived from it

    def __init__(self, settings: BaseModel, setting: Setting) -> None:
        self.settings, self.setting = settings, setting

    def is_personal(self, name: str) -> bool:
        """Whether every client has a tensor called ``name`` of its own, so that no global one serves them all."""
        return self.setting.personal_head and name.startswith(HEAD)

    def resizes(self, name: str) -> bool:
        """Whether ``aggregate`` may change the number of rows of the tensor called ``name``: of a pool."""
        return name == "pool"

    def is_constant(self, name: str) -> bool:
        """Whether the tensor called ``name`` never changes: all draw it from the run's seed, nobody sends it."""
        return name in self.setting.constants

    def travels(self, name: str) -> bool:
        """Whether the tensor called ``name`` goes over the network; by default what is personal stays at home."""
        return not self.is_personal(name) and not self.is_constant(name)

    def trains(self, name: str) -> bool:
        """Whether clients train the tensor called ``name``; what they do not train does not travel back."""
        return not self.is_constant(name)

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
        own = {name: value for name, value in state.clients.get(client, {}).items() if name in state.params}
        return {**state.params, **state.memory.get("personal_start", {}), **own}

    def send(self, state: State, client: int) -> Params:
        """What the server sends to a client's rule beside the params; by default nothing."""
        return {}

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """How a client steps: by default the optimizer of the configuration."""
        return make_rule(options)

    def summarize(self, updates: Sequence[Update]) -> list[Update]:
        """Make of a group's updates what ``aggregate`` needs of them; a worker does before it sends them.

        Where that is the mean by samples, the finite ones become one; else, and where a client keeps anything, they
        stay as they are.
        """
        finite = [update for update in updates if is_finite(update.params)]
        if not self.needs_only_mean or len(finite) < 2 or any(self._is_of_its_own(update) for update in finite):
            return list(updates)
        samples = [update.samples for update in finite]
        mean = Update(
            client=min(update.client for update in finite),
            samples=sum(samples),
            steps=sum(update.steps for update in finite),
            params=weighted_mean([update.params for update in finite], samples),
            selected=None,
            loss=sum(update.loss * update.samples for update in finite) / sum(samples),
            merged=tuple(sorted(update.client for update in finite)),
        )
        return [mean, *(update for update in updates if not is_finite(update.params))]

    def _is_of_its_own(self, update: Update) -> bool:
        return bool(update.reply or update.kept or any(self.is_personal(name) for name in update.params))

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Make the next state out of the cohort's updates (in ascending order of clients, all of them finite).

        With ``needs_only_mean`` an update may be the mean of several clients' (``Update.clients``). Where clients send
        to each other, the metrics hold ``TRAFFIC``: bytes sent and received by clients, and the number of messages.
        """
        raise NotImplementedError

    def after_test(self, state: State, selected: np.ndarray | None) -> State:
        """Be told which prompts of the pool served the test set, bool [P]; by default nobody listens."""
        return state

    def remember(self, state: State, updates: Sequence[Update]) -> State:
        """Put what stays at home of the updates, and what rules left with their clients, into the client store."""
        stores = {
            update.client: {
                **{n: value for n, value in update.params.items() if self.is_personal(n) and not self.travels(n)},
                **{RULE + name: value for name, value in update.kept.items()},
            }
            for update in updates
        }
        return replace(state, clients={**state.clients, **{c: store for c, store in stores.items() if store}})

    def task(self, state: State, client: int, epochs: float) -> Task:
        """One client's work in this round: what it is sent, and what its rule left with it the last time."""
        store = state.clients.get(client, {})
        kept = {name.removeprefix(RULE): value for name, value in store.items() if name.startswith(RULE)}
        return Task(client, self.broadcast(state, client), epochs, self.send(state, client), kept)

    def travelling(self, task: Task, update: Update) -> tuple[Params, Params]:
        """Tensors that one client's part in a round sends over the network: (down to it, up from it)."""
        down = {name: value for name, value in task.params.items() if self.travels(name)}
        up = {name: value for name, value in update.params.items() if self.travels(name) and self.trains(name)}
        return {**down, **_marked(task.sent)}, {**up, **_marked(update.reply)}

    def warnings(self, metrics: Metrics) -> list[str]:
        """Lines that a user should read about a round, from its metrics."""
        return []


def _marked(beside: Params) -> Params:
    return {RULE + name: value for name, value in beside.items()}
