"""PFPT: probabilistic federated prompt tuning.

P.-Y. Weng, M. Hoang, L. M. Nguyen, M. T. Thai, T.-W. Weng, T. N. Hoang: Probabilistic Federated Prompt-Tuning with
Non-IID and Imbalanced Data. NeurIPS 2024, arXiv 2502.19752.

Client. A pool of P prompts, searched with the query q(x) (``models/kinds/pool.py``). It returns its version
of the pool and which prompts it used.

Server. U = the prompts that at least one client of the cohort used. Every client contributes its version of all of U,
a set P_t of n = |U| prompts. The sets are taken for draws of one generative process with K = C·n candidates φ_k:

    c_tk ~ Bernoulli(p(φ_k)),   and if c_tk = 1, one prompt of client t is drawn from N(φ_k, diag σ²(φ_k))

which is fitted by alternating gradient steps on (φ, σ, p) and weighted bipartite matchings of each client's prompts to
the candidates (``set_aggregation.py``). The candidates that anyone is matched to are the new pool: it grows where
clients disagree and shrinks where prompts go unused. What is not a prompt is averaged by the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, Count, MethodSettings, Metrics, Rate, Setting, State
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, SetAggregation, aggregate_sets
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update
from fedprompt.errors import InputError
from fedprompt.models.params import weighted_mean
from fedprompt.wording import counted

SERVED = "served_in_test"


class FitSettings(MethodSettings):
    """How the server fits the generative model.

    ``schedule``: ``sequential`` steps and matches client by client as the published code does, ``joint`` all at once.
    ``prior``: ``odds`` weighs a candidate by log p − log(1 − p), as the objective demands; ``reference`` is the
    published code's form; ``none`` matches by the likelihood alone.
    """

    schedule: Literal["sequential", "joint"] = "sequential"
    prior: Literal["odds", "reference", "none"] = "odds"
    sweeps: int = Field(50, ge=1, le=100_000)
    lr: Rate = 1e-3
    hidden: int = Field(128, ge=1, le=16_384)

    def generative(self) -> GenerativeSettings:
        """The settings as the set aggregation takes them."""
        return GenerativeSettings(**{name: getattr(self, name) for name in FitSettings.model_fields})


class PoolSettings(MethodSettings):
    """What becomes of a pool that is matched.

    ``candidates``: which prompts are matched, those that the ``cohort`` used, or, as in the
    published code, also those that served the test set (``cohort+test``: it looks at test images). ``max_pool``: keep
    at most so many prompts, the most used ones. ``warn_growth``: warn when the pool has grown past this multiple of
    its first size.
    """

    candidates: Literal["cohort", "cohort+test"] = "cohort"
    max_pool: Count | None = None
    warn_growth: float = Field(3.0, gt=1, le=1e6)


class PFPTSettings(PoolSettings, FitSettings):
    """How the server fits the generative model, and what becomes of the pool."""


@algorithm(
    "pfpt",
    "PFPT: prompt sets aligned by a generative model and matching, a pool that sizes itself",
    "Weng et al., Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data, NeurIPS 2024",
)
class PFPT(Algorithm):
    """The generative set aggregation on a prompt pool."""

    kinds = ("pool",)
    Settings: ClassVar[type[PoolSettings]] = PFPTSettings
    settings: PoolSettings

    def __init__(self, settings: PoolSettings, setting: Setting) -> None:
        super().__init__(settings, setting)
        if settings.max_pool is not None and settings.max_pool < setting.top_k:
            raise InputError(
                f"algorithm.max_pool: {settings.max_pool} is less than prompt.top_k = {setting.top_k}, which a batch "
                f"takes; allowed: {setting.top_k} or more"
            )

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Average what is not a prompt; the candidates that the fitted model uses are the new pool."""
        params = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        used = self.used(state, updates)
        sets = torch.stack([update.params["pool"][used] for update in updates])  # [C, n, D]
        start = state.params["pool"][used]
        fitted = self.fit(start, sets, [update.samples for update in updates], rng)
        params["pool"] = fitted.pool
        metrics = {
            **fitted.metrics,
            "used": float(used.sum()),
            "moved_relative": float((sets - start).square().mean().sqrt() / start.square().mean().sqrt()),
        }
        memory = {name: value for name, value in state.memory.items() if name != SERVED}  # of the pool before
        return self.remember(replace(state, params=params, memory=memory), updates), metrics

    def used(self, state: State, updates: Sequence[Update]) -> Tensor:
        """Which prompts of the pool are matched, U as bool [P]."""
        selected = [update.selected for update in updates if update.selected is not None]
        if SERVED in state.memory:
            selected.append(state.memory[SERVED])
        return torch.stack(selected).any(0)

    def fit(self, start: Tensor, sets: Tensor, samples: Sequence[int], rng: np.random.Generator) -> SetAggregation:
        """The new pool, out of the clients' sets [C, n, D] of what was sent as ``start`` [n, D]."""
        return aggregate_sets(sets, self.settings.generative(), rng, self.settings.max_pool)

    def after_test(self, state: State, selected: np.ndarray | None) -> State:
        """Under ``cohort+test``, remember which prompts served the test set until the next aggregation."""
        if self.settings.candidates == "cohort" or selected is None:
            return state
        return replace(state, memory={**state.memory, SERVED: torch.from_numpy(selected)})

    def warnings(self, metrics: Metrics) -> list[str]:
        """Say so when the pool has shrunk to what one batch takes, or grows without end."""
        size, start = metrics["pool_size"], self.setting.pool_size
        if size <= self.setting.top_k < start:
            return [f"the pool has shrunk to {counted(size, 'prompt')}: every batch now takes all of them"]
        if size > self.settings.warn_growth * start:
            return [f"the pool has grown from {start:.0f} to {counted(size, 'prompt')} (algorithm.max_pool caps it)"]
        return []
