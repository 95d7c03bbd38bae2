"""What a server hands to clients and gets back from them: plain data, without a model or a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from fedprompt.client.rules.base import LocalRule
from fedprompt.models.params import Params


@dataclass(frozen=True)
class Task:
    """One client's work in one round: what it was sent, and how long it trains."""

    client: int
    params: Params
    epochs: float = 1.0  # 2.5: two passes over the data and half of a third
    sent: Params = field(default_factory=dict)  # what the server sends to the rule beside the params
    kept: Params = field(default_factory=dict)  # what the rule left with this client when it last took part


@dataclass(frozen=True)
class Update:
    """What comes back from one client, or from several whose updates were averaged on the way."""

    client: int
    samples: int  # n_t
    steps: int
    params: Params
    selected: Tensor | None  # bool [P]: prompts of the pool that served at least one batch
    loss: float  # mean over the steps, each before its update
    reply: Params = field(default_factory=dict)  # what the rule sends to the server beside the params
    kept: Params = field(default_factory=dict)  # what the rule leaves with the client
    merged: tuple[int, ...] = ()  # the clients that this update is the mean of; empty: `client` alone
    epochs: tuple[Params, ...] = ()  # what was trained as it was at the end of every epoch, where that was asked for

    @property
    def clients(self) -> tuple[int, ...]:
        """Whose update it is."""
        return self.merged or (self.client,)


@dataclass(frozen=True)
class Training:
    """How clients train, the same for all: the rule, the batch size, which tensors move, and the seed of a round."""

    rule: LocalRule
    batch_size: int
    trains: Callable[[str], bool]
    seed: int
    round: int
    domain_classes: np.ndarray | None = None  # bool [domains, K]
    keep_epochs: bool = False  # whether updates hold the params at the end of every epoch


def steps_of(samples: int, epochs: float, batch_size: int) -> int:
    """Number of local steps: whole epochs of ceil(n / B) batches, and the rounded share of one more."""
    per_epoch = math.ceil(samples / batch_size)
    return max(1, round(epochs * per_epoch))
