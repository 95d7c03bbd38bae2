"""Local update rules: what one step does with the gradient (or the loss alone) of the clients' current batches.

A rule sees stacked params {name: [C, ...]} of the clients that still have steps to go. What it must remember from step
to step are ``Slots``, stacked in the same way, so that clients which are done can leave from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedprompt.models.params import HEAD, Params

Slots = dict[str, Params]


class Oracle(Protocol):
    """Answers a rule's questions about the clients' current batches."""

    opens_epoch: Tensor  # bool [C]: whose batch is the first of an epoch
    rngs: Sequence[np.random.Generator]  # C, each client's own in this round

    def loss(self, params: Params) -> Tensor:
        """Each client's loss [C]; raises OutOfBudget where the model is a service that refuses to answer."""

    def grad(self, params: Params) -> tuple[Tensor, Params]:
        """Each client's loss [C] and its gradient {name: [C, ...]}."""

    def added(self, params: Params) -> tuple[Tensor | float, Params]:
        """What the client itself adds to its loss and so need not ask for, [C], and the gradient of that."""


class LocalRule:
    """One way to step. The base class remembers nothing and sends nothing."""

    def start(self, params: Params, sent: Params, kept: Params) -> Slots:
        """Slots before the first step, out of what the server sent along and what the rule once left with the clients.

        Both are stacked; a client that has nothing of a name yet (it takes part for the first time) has zeros.
        """
        return {}

    def step(self, params: Params, slots: Slots, oracle: Oracle) -> tuple[Params, Slots, Tensor]:
        """Make one step: the stepped params, the slots and the losses [C] before the step."""
        raise NotImplementedError

    def finish(self, params: Params, slots: Slots, steps: int) -> tuple[Params, Params]:
        """After the last of ``steps`` steps: what is sent to the server beside the params, and what stays behind."""
        return {}, {}


@dataclass(frozen=True)
class ZerothOptions:
    """Gains of the zeroth-order rules, in the symbols of ``client/rules/zeroth_order.py`` (section ``blackbox``)."""

    c: float = 0.01
    offset: float = 1.0
    alpha: float = 0.4
    gamma: float = 0.1
    beta: float = 0.9
    draws: int = 1


@dataclass(frozen=True)
class LocalOptions:
    """Settings of the local optimizer (configuration section ``local``)."""

    optimizer: str = "adam"
    lr: float = 5e-4
    prompt_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    momentum: float = 0.0
    rho: float = 0.0  # of SAM (`client/rules/sam.py`), which the worker puts around the rule
    zeroth: ZerothOptions = ZerothOptions()

    def rate(self, name: str) -> float:
        """Learning rate of the tensor called ``name``: the head's, or the prompts'."""
        return self.lr if self.prompt_lr is None or name.startswith(HEAD) else self.prompt_lr
