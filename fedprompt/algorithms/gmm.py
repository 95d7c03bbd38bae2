"""GMM-PT: all local prompts together, one Gaussian mixture, its means are the new prompts.

A baseline of P.-Y. Weng et al.: Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data. NeurIPS 2024,
arXiv 2502.19752. The C cohort's prompt sets of L prompts each are C·L points in R^D; they are fitted by

    plain:     Σ_l π_l N(p; μ_l, diag σ_l²), by expectation–maximisation
    bayesian:  the same with a Dirichlet process over the weights and priors on means and variances, variationally
               (the prior on means counts as one more prompt, at the mean of all, for every component)

with L components, and the means μ_1, …, μ_L are the next prompts. What is not a prompt is averaged by samples. Unlike
PFPT's model nothing keeps two prompts of one client apart, and the number of prompts is fixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from threadpoolctl import threadpool_limits
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, MethodSettings, Metrics, Positive, State
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.tasks import Update
from fedprompt.models.params import weighted_mean

SETS = ("prompt", "deep", "pool")  # params [..., L, D] whose rows are sets of prompts


class GMMSettings(MethodSettings):
    """The mixture; ``covariance``, ``regularization`` and ``iterations`` are those of scikit-learn's estimators."""

    mixture: Literal["plain", "bayesian"] = "plain"
    covariance: Literal["diag", "spherical", "tied", "full"] = "diag"
    regularization: Positive = 1e-6
    iterations: int = Field(100, ge=1, le=100_000)


@algorithm(
    "gmm",
    "GMM-PT: a Gaussian mixture over all local prompts, its means are the next ones",
    "a baseline of Weng et al., Probabilistic Federated Prompt-Tuning with Non-IID and …, NeurIPS 2024",
)
class GMM(Algorithm):
    """The means of a mixture as prompts, on a fixed prompt, deep prompts (every block for itself) or the pool."""

    kinds = SETS
    Settings = GMMSettings
    settings: GMMSettings

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """Fit a mixture per set of prompts, average the rest."""
        params = weighted_mean([update.params for update in updates], [update.samples for update in updates])
        rounds = []
        for name in (name for name in SETS if name in params):
            sets = torch.stack([update.params[name] for update in updates])  # [C, ..., L, D]
            flat = sets.flatten(1, -3) if sets.ndim > 3 else sets[:, None]  # [C, blocks, L, D]
            fits = [self._means(flat[:, block], rng) for block in range(flat.shape[1])]
            rounds += [iterations for _, iterations in fits]
            params[name] = torch.stack([means for means, _ in fits]).view_as(params[name])
        return self.remember(replace(state, params=params), updates), {"mixture_iterations": float(np.mean(rounds))}

    def _means(self, sets: Tensor, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Means [L, D] of the mixture fitted to sets [C, L, D], and how many iterations that took."""
        from sklearn.exceptions import ConvergenceWarning  # a third of what every process of a run would import
        from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

        points = sets.flatten(0, 1)
        if len(points) == 1:  # scikit-learn wants two
            return points, 0
        estimator = {"plain": GaussianMixture, "bayesian": BayesianGaussianMixture}[self.settings.mixture]
        mixture = estimator(
            n_components=sets.shape[1],
            covariance_type=self.settings.covariance,
            reg_covar=self.settings.regularization,
            max_iter=self.settings.iterations,
            random_state=int(rng.integers(2**31)),
        )
        with warnings.catch_warnings(), threadpool_limits(1):  # the same bits on any number of cores
            warnings.simplefilter("ignore", ConvergenceWarning)  # `mixture_iterations` tells
            _fit(mixture, points.double().numpy())
        return torch.from_numpy(mixture.means_).to(sets.dtype), mixture.n_iter_


def _fit(mixture: Any, points: np.ndarray) -> None:
    """Fit; raises FloatingPointError where a component's covariance has no inverse."""
    try:
        mixture.fit(points)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise FloatingPointError(f"{reason}; a larger algorithm.regularization prevents it") from error
