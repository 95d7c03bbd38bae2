"""MIFA on prompts (MIFA-PT): memory-augmented impatient federated averaging.

X. Gu, K. Huang, J. Zhang, L. Huang: Fast Federated Learning in the Presence of Arbitrary Device Unavailability. NeurIPS
2021, arXiv 2106.04159. Algorithm 1: the server keeps every client's newest move, and steps along the mean of all:

    G^k ← w^k − w_t  for k in S_t;   G^k of the others as it was
    w_{t+1} = w_t + η / |H_t| Σ_{k in H_t} G^k

The mean is uniform, as in the paper. There, everybody takes part in the first round, and η is the clients' own rate:
here H_t are the clients that have been heard of up to round t, and η = 1 takes their moves as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, Rate, State
from fedprompt.algorithms.memory import heard
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update
from fedprompt.models.params import weighted_mean


class MifaSettings(MethodSettings):
    """``server_lr``: η."""

    server_lr: Rate = 1.0


@algorithm(
    "mifa",
    "MIFA: the server steps along the mean of every client's newest move",
    "Gu et al., Fast Federated Learning in the Presence of Arbitrary Device Unavailability, NeurIPS 2021",
)
class Mifa(Algorithm):
    """FedAvg of moves, those of clients that stay away included."""

    Settings = MifaSettings
    settings: MifaSettings

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """w ← w + η mean G; personal tensors are averaged over the cohort, for scoring only."""
        average = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        shared = [name for name in state.params if self.travels(name)]
        moves = [
            replace(update, params={name: update.params[name] - state.params[name] for name in shared})
            for update in updates
        ]
        state, newest, metrics = heard(state, moves)
        mean = weighted_mean([move.params for move in newest], [1.0] * len(newest))
        moved = {name: state.params[name] + self.settings.server_lr * mean[name] for name in shared}
        return self.remember(replace(state, params={**average, **moved}), updates), metrics
