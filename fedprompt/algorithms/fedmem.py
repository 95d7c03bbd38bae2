"""FedMem: FedAvg over everybody's newest params. There is no published form.

With H_t the clients that the server has heard of up to round t, and w^k what client k sent when it last took part,

    w_{t+1} = Σ_{k in H_t} n_k / n · w^k ,   n = Σ_{k in H_t} n_k

which is FedAvg where everybody takes part in every round. MIFA (``mifa.py``) remembers moves, this remembers where they
led: a client that is not there votes for where it was last, and so for staying there.

The head is what swings with the cohort. ``remembers: head`` keeps everybody's newest head alone: all else is FedAvg's,
the mean over the cohort, which follows the clients faster.

``mu`` > 0: clients are pulled to what they were sent, FedProx's rule (``fedprox.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, State, Weight
from fedprompt.algorithms.fedprox import pulled
from fedprompt.algorithms.memory import heads, remembered_mean
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule
from fedprompt.client.tasks import Update
from fedprompt.errors import InputError
from fedprompt.models.params import HEAD, Params, weighted_mean


class FedMemSettings(MethodSettings):
    """What is remembered, everything or the head alone; ``mu``: weight of the clients' pull to what they were sent."""

    remembers: Literal["all", "head"] = "all"
    mu: Weight = 0.0


@algorithm("fedmem", "FedMem: the newest params of every client that was ever heard of are averaged")
class FedMem(Algorithm):
    """FedAvg whose server remembers what those who stay away sent last."""

    Settings = FedMemSettings
    settings: FedMemSettings

    def init(self, params: Params, rng: np.random.Generator) -> State:
        """State before the first round; raises InputError where the head is to be remembered and there is none."""
        if self.settings.remembers == "head" and not any(name.startswith(HEAD) for name in params):
            raise InputError("algorithm.remembers: 'head', but no head is trained (head.kind); allowed: all")
        return super().init(params, rng)

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """The configuration's optimizer, with FedProx's pull where μ > 0."""
        return pulled(super().rule(options, round), self.settings.mu, self.setting)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """w ← Σ n_k w_k / Σ n_k over all that have been heard of."""
        if self.settings.remembers == "all":
            state, mean, metrics = remembered_mean(state, updates)
        else:
            state, everybodys, metrics = remembered_mean(state, heads(updates))
            cohorts = weighted_mean([update.params for update in updates], [update.samples for update in updates])
            mean = {**cohorts, **everybodys}
        return self.remember(replace(state, params=mean), updates), metrics
