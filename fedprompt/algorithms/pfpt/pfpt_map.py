"""PFPT around the pool that was sent, fitted in closed form. There is no published form.

The generative view of Weng et al. (NeurIPS 2024, arXiv 2502.19752; ``pfpt.py``), with three changes:

- What clients are matched to lasts: the candidates are the prompts that were sent, from which every client's version
  of them starts, and new ones where they do not fit. So averaging slot by slot is the limit where nobody leaves.
- Nothing is fitted by gradient steps: candidates are posterior means, variances are estimated by moments, how often a
  candidate is used is integrated out (``map_aggregation.py``). So nothing drifts, and scale plays no role.
- Clients count by their number of samples.

``mu`` > 0 is the same prior at the clients: the loss plus μ/2 ‖w − w_sent‖² of all that they train, FedProx's rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field
from torch import Tensor

from fedprompt.algorithms.base import Positive, Weight
from fedprompt.algorithms.fedprox import pulled
from fedprompt.algorithms.pfpt.map_aggregation import MapOptions, aggregate_around
from fedprompt.algorithms.pfpt.pfpt import PFPT, PoolSettings
from fedprompt.algorithms.pfpt.set_aggregation import SetAggregation
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule


class PFPTMapSettings(PoolSettings):
    """The model's priors, and the pull at the clients.

    ``gamma``: γ, the rate of new prompts. ``concentration``: a of the Beta(a, a) over how often a prompt is used.
    ``evidence``: as how many independent coordinates the D of a prompt count in a match. ``sweeps``: at most so many.
    ``mu``: weight of the clients' pull to what they were sent.
    """

    gamma: Positive = 1.0
    concentration: Positive = 1.0
    evidence: Positive = 10.0
    sweeps: int = Field(10, ge=1, le=100_000)
    mu: Weight = 0.0

    def options(self) -> MapOptions:
        """The settings as the set aggregation takes them."""
        return MapOptions(self.gamma, self.concentration, self.evidence, self.sweeps)


@algorithm(
    "pfpt-map",
    "PFPT around the pool that was sent: posterior means in closed form, new prompts where clients' do not fit",
    "after Weng et al., NeurIPS 2024 (no published form)",
)
class PFPTMap(PFPT):
    """The closed-form set aggregation on a prompt pool."""

    Settings = PFPTMapSettings
    settings: PFPTMapSettings

    def fit(self, start: Tensor, sets: Tensor, samples: Sequence[int], rng: np.random.Generator) -> SetAggregation:
        """The posterior means of the prompts that are in use."""
        return aggregate_around(start, sets, samples, self.settings.options(), self.settings.max_pool)

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """The configuration's optimizer, with FedProx's pull where μ > 0."""
        return pulled(super().rule(options, round), self.settings.mu, self.setting)
