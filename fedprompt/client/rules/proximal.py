"""A proximal term in the client's loss, around any local rule: its form and weight are the method's."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fedprompt.client.rules.base import LocalRule, Oracle, Slots
from fedprompt.client.rules.wrappers import WrappedOracle, WrappedRule
from fedprompt.models.params import Params


class Pull(Protocol):
    """A proximal term of params that are ``away`` = w − w^t from their start, {name: [C, ...]}."""

    def penalty(self, away: Params, opens_epoch: Tensor) -> Tensor:
        """The term [C]."""

    def pull(self, away: Params, opens_epoch: Tensor) -> Params:
        """Its gradient {name: [C, ...]}."""


class Proximal(WrappedRule):
    """Another rule's steps, with the gradient of the proximal term added to the loss's."""

    def __init__(self, inner: LocalRule, prox: Pull) -> None:
        super().__init__(inner)
        self._prox = prox

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        return {**self._inner.start(params, sent, kept), "anchor": {n: value.clone() for n, value in params.items()}}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        stepped, after, losses = self._inner.step(params, slots, _Pulled(oracle, slots["anchor"], self._prox))
        return stepped, {**after, "anchor": slots["anchor"]}, losses


class _Pulled(WrappedOracle):
    """An oracle whose gradients are those of the loss and the proximal term; its losses are those of the loss alone."""

    def __init__(self, inner: Oracle, anchor: Params, prox: Pull) -> None:
        super().__init__(inner)
        self._anchor, self._prox = anchor, prox

    def added(self, params: Params) -> tuple[Tensor | float, Params]:
        """The proximal term and its gradient, with what clients add to their loss without it."""
        before, known = self._inner.added(params)
        away = {name: value - self._anchor[name] for name, value in params.items()}
        pulls = self._prox.pull(away, self.opens_epoch)
        pulls = {name: pull + known[name] if name in known else pull for name, pull in pulls.items()}
        return before + self._prox.penalty(away, self.opens_epoch), pulls

    def grad(self, params: Params) -> tuple[Tensor, Params]:
        losses, grads = self._inner.grad(params)
        pulls = self._prox.pull({n: params[n] - self._anchor[n] for n in grads}, self.opens_epoch)
        return losses, {name: grad + pulls[name] for name, grad in grads.items()}
