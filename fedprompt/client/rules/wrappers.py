"""Base classes of what stands around a local rule or an oracle: they pass on everything that they do not change.

A wrapper overrides the functions that it changes, and asks ``self._inner`` there. So nothing is lost that another rule
sends, keeps or asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fedprompt.client.rules.base import LocalRule, Oracle, Slots
from fedprompt.models.params import Params


class WrappedRule(LocalRule):
    """Another rule, unchanged."""

    def __init__(self, inner: LocalRule) -> None:
        self._inner = inner

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        """The inner rule's slots."""
        return self._inner.start(params, sent, kept)

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        """The inner rule's step."""
        return self._inner.step(params, slots, oracle)

    def finish(self, params: Params, slots: Slots, steps: int) -> tuple[Params, Params]:
        """What the inner rule sends and leaves."""
        return self._inner.finish(params, slots, steps)


class WrappedOracle:
    """Another oracle, unchanged."""

    def __init__(self, inner: Oracle) -> None:
        self._inner = inner

    @property
    def opens_epoch(self) -> Tensor:
        """Whose batch is the first of an epoch, bool [C]."""
        return self._inner.opens_epoch

    @property
    def rngs(self) -> Sequence[np.random.Generator]:
        """Each client's own generator."""
        return self._inner.rngs

    def loss(self, params: Params) -> Tensor:
        """Each client's loss [C]."""
        return self._inner.loss(params)

    def grad(self, params: Params) -> tuple[Tensor, Params]:
        """Each client's loss [C] and its gradient."""
        return self._inner.grad(params)

    def added(self, params: Params) -> tuple[Tensor | float, Params]:
        """What clients add to their loss [C], and the gradient of that."""
        return self._inner.added(params)
