"""Sharpness-aware minimization as a local rule: any other rule, answered with gradients from a point uphill.

P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization.
ICLR 2021, arXiv 2010.01412. With the batch's loss f and its gradient g = ∇f(w):

    g̃ = ∇f(w + ρ g / ‖g‖)          and the rule steps from w along g̃

‖·‖ runs over everything that a client trains. So SAM goes with every rule and every method: FedAvg with ρ > 0 is
FedSAM (Qu et al., ICML 2022; Caldarola et al., ECCV 2022). A step costs two gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedprompt.client.rules.base import LocalRule, Oracle, Slots
from fedprompt.client.rules.wrappers import WrappedOracle, WrappedRule
from fedprompt.models.params import Params

TINY = 1e-12  # added to ‖g‖: no gradient, no perturbation


class SamOracle(WrappedOracle):
    """Answers with the loss at w and the gradient at w + ρ g / ‖g‖."""

    def __init__(self, inner: Oracle, rho: float) -> None:
        super().__init__(inner)
        self._rho = rho

    def grad(self, params: Params) -> tuple[Tensor, Params]:
        """Each client's loss [C] at ``params``, and its gradient at the point uphill of them."""
        losses, grads = self._inner.grad(params)
        squares = torch.stack([g.square().flatten(1).sum(1) for g in grads.values()])  # [tensors, C]
        scale = self._rho / (squares.sum(0).sqrt() + TINY)  # [C]
        uphill = {n: w + scale.reshape(-1, *(1,) * (w.ndim - 1)) * grads[n] for n, w in params.items()}
        return losses, self._inner.grad(uphill)[1]


class SharpnessAware(WrappedRule):
    """Another rule that never sees a gradient but SAM's."""

    def __init__(self, inner: LocalRule, rho: float) -> None:
        super().__init__(inner)
        self._rho = rho

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        return self._inner.step(params, slots, SamOracle(oracle, self._rho))


def sharpness_aware(rule: LocalRule, rho: float) -> LocalRule:
    """Return ``rule`` with SAM around it, or at ρ = 0 the rule itself, which then asks for one gradient per step."""
    return SharpnessAware(rule, rho) if rho else rule
