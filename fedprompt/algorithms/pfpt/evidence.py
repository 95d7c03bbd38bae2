"""The matching weights of PFPT's generative model: what states of its parameters say about clients' prompts.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS 2024, arXiv 2502.19752.
Under ``prior="odds"`` client t's prompt j is worth to candidate k

    W_tjk = log N(p_tj; φ_k, σ²(φ_k)) + log p(φ_k) - log(1 - p(φ_k))

:mod:`fedprompt.algorithms.pfpt.generative_model` says what these are, and what W is under the other priors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fedprompt.algorithms.pfpt.generative_model import Forward, Prior
from fedprompt.models.linear import plain_linear

# Nobody asks for a client's assignment before its own next step, so that the weights of many clients can be finished at
# a time, with fewer and longer operations. At most so many.
_STATES = 32
# A squared distance below this share of the candidate's own square has lost four bits to cancellation.
_CLOSE = 1 / 8
# Where a candidate's square is below this, distances are exact to a thousandth, cancelled or not: their size is D's.
_HARMLESS = 500
# Pairs whose differences [pairs, D] are held at a time: they stay in the cache.
_PAIRS = 256


def matching_weights(sets: Tensor, phi: Tensor, nets: Forward, assignment: Tensor, prior: Prior) -> Tensor:
    """Return W [C, n, K] of ``sets`` [C, n, D] by ``nets``, the outcome of ``forward`` for ``phi`` [K, D].

    ``assignment`` [C, n] is the clients' current one.
    """
    return weigh(*evidence(sets, phi, nets), assignment, prior)


def evidence(sets: Tensor, phi: Tensor, nets: Forward) -> tuple[Tensor, Tensor]:
    """Return log N(p_tj; φ_k, σ_k²) [C, n, K] and log p - log(1 - p) [C, K] in float64: one state, all clients."""
    noted = Evidence(sets, len(sets), len(phi))
    noted.add(phi, nets)
    return noted.take()


def weigh(likelihood: Tensor, logit: Tensor, assignment: Tensor, prior: Prior) -> Tensor:
    """Return W [C, n, K] of what :func:`evidence` returns, under the clients' current ``assignment`` [C, n]."""
    if prior == "none":
        return likelihood
    if prior == "odds":
        return likelihood + logit.unsqueeze(1)
    bernoulli = F.logsigmoid(-logit).scatter(1, assignment, F.logsigmoid(logit).gather(1, assignment))
    return likelihood + assignment.shape[1] * bernoulli.unsqueeze(1)


class Evidence:
    """What states of the parameters say about clients, group after group, kept until it is taken."""

    def __init__(self, sets: Tensor, size: int, candidates: int) -> None:
        """Make room for what is said about ``sets`` [C, n, D], in groups of ``size`` clients, by ``candidates`` K."""
        clients, prompts, width = sets.shape
        self._size = size
        self._prompts = sets.reshape(clients // size, size * prompts, width)
        self._terms = torch.cat([self._prompts.square(), -2 * self._prompts], 2)
        self._factors = sets.new_empty(candidates, 2, width)
        self._first = 0  # the group that is first of those noted
        self._noted: list[tuple[Tensor, ...]] = []

    @property
    def full(self) -> bool:
        """Whether it must be taken before another group is noted: it is enough, or all groups had their turn."""
        return len(self._noted) in (_STATES, len(self._prompts) - self._first)

    @property
    def clients(self) -> slice:
        """The clients noted."""
        return slice(self._first * self._size, (self._first + len(self._noted)) * self._size)

    def add(self, phi: Tensor, nets: Forward) -> None:
        """Note what ``nets``, the outcome of ``forward`` for ``phi`` [K, D], says about the next group.

        Distances are expanded, x² / σ² - 2x φ / σ² + φ² / σ², so that they are one matrix product.
        """
        group = self._first + len(self._noted)
        precision, scaled = self._factors.unbind(1)
        torch.pow(nets.sigma, -2, out=precision)
        torch.mul(phi, precision, out=scaled)
        own = torch.linalg.vecdot(phi, scaled)  # [K]
        distance = plain_linear(self._terms[group], self._factors.flatten(1), own)  # [size·n, K]
        _mend(distance, own, self._prompts[group], phi, nets.sigma)
        self._noted.append((distance, _log_product(nets.sigma), nets.logit))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return what :func:`evidence` does, of the clients noted, and forget them."""
        distance, log_sigma, logit = (torch.stack(each) for each in zip(*self._noted, strict=True))
        constant = log_sigma.unsqueeze(1) + 0.5 * self._prompts.shape[2] * math.log(2 * math.pi)  # [states, 1, K]
        normal = distance.double().mul_(-0.5).sub_(constant)
        self._first = (self._first + len(self._noted)) % len(self._prompts)
        self._noted = []
        likelihood = normal.unflatten(1, (self._size, -1)).flatten(0, 1)  # [states, size·n, K] -> [C', n, K]
        return likelihood, logit.double().repeat_interleave(self._size, 0)


def _mend(distance: Tensor, own: Tensor, prompts: Tensor, phi: Tensor, sigma: Tensor) -> None:
    """Correct Σ_d (x - φ)² / σ² [R, K] of ``prompts`` [R, D], expanded with ``own`` = φ² / σ² [K], in place.

    Where the expansion cancels and its terms are large, for prompts close to a candidate of small σ, the distance is
    taken from the difference.
    """
    close = (distance < _CLOSE * own).logical_and_(own > _HARMLESS).nonzero()
    for row, k in (pairs.unbind(1) for pairs in close.split(_PAIRS) if len(pairs)):
        difference = prompts.index_select(0, row).sub_(phi.index_select(0, k))
        standardised = difference.div_(sigma.index_select(0, k))
        distance[row, k] = torch.linalg.vecdot(standardised, standardised)


def _log_product(sigma: Tensor) -> Tensor:
    """Return Σ_d log σ_kd [K] in float64, with one logarithm for sixteen factors: their product is 1e-240 or more."""
    missing = -sigma.shape[1] % 16
    padded = F.pad(sigma, (0, missing), value=1.0) if missing else sigma
    return padded.unflatten(1, (16, -1)).prod(1, dtype=torch.float64).log_().sum(1)
