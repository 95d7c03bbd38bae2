"""A batch of several clients at once, and what the model says about it.

M samples stand one after the other, group by group. A group shares one row of stacked params and votes together: in
training it is a client's current batch, in evaluation one batch of the test set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprompt.models.backbones.base import InputTensors, Tokens


@dataclass(frozen=True)
class Batch:
    """What the model is given: the samples as far as the frozen part could be computed beforehand."""

    counts: tuple[int, ...]  # samples per group, G numbers with sum M
    group: Tensor  # int64 [M]: which group a sample belongs to
    slot: Tensor  # int64 [M]: its place within the group
    labels: Tensor  # int64 [M]
    mask: Tensor | None  # bool [M, K]: classes that the sample may have; None: all
    inputs: InputTensors | None  # each [M, ...]; None where `tokens` (or `query` alone) takes their place
    tokens: Tokens | None  # of M samples, before the lowest block that a trained tensor touches
    query: Tensor | None  # [M, D]: feature of the backbone without prompts
    keep: Tensor | None  # [G, B, hidden]: dropout factors of the head, 0 or 1 / (1 - p); None: no dropout

    @property
    def given(self) -> InputTensors:
        """The inputs, of a batch that has them."""
        assert self.inputs is not None, "this batch holds no inputs: they were let go when features were prepared"
        return self.inputs

    @property
    def width(self) -> int:
        """B, the size of the largest group."""
        return max(self.counts)

    def padded(self, values: Tensor) -> Tensor:
        """Spread values [M, ...] over groups as [G, B, ...], zeros where a group is short."""
        if min(self.counts) == self.width:
            return values.reshape(len(self.counts), self.width, *values.shape[1:])
        room = values.new_zeros(len(self.counts), self.width, *values.shape[1:])
        return room.index_put((self.group, self.slot), values)

    def unpadded(self, values: Tensor) -> Tensor:
        """Take the samples' own values [M, ...] out of [G, B, ...]: undoes ``padded``."""
        flat = values.flatten(0, 1)
        if min(self.counts) == self.width:
            return flat
        return flat.index_select(0, self.group * self.width + self.slot)

    def group_mean(self, values: Tensor) -> Tensor:
        """Return the mean of values [M] within each group as [G]."""
        zeros = values.new_zeros(len(self.counts))
        # counted where the values are: sending the counts there would make a GPU wait
        return zeros.index_add(0, self.group, values) / zeros.index_add(0, self.group, torch.ones_like(values))


@dataclass(frozen=True)
class Output:
    """What the model says: class scores, the kind's own loss term, and which prompts of the pool it used."""

    logits: Tensor  # [M, K]
    penalty: Tensor  # [G]: to be added to each group's cross-entropy
    selected: Tensor | None  # bool [G, P]


def groups_of(counts: tuple[int, ...], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return (group, slot), int64 [M] each, for groups of the given sizes that stand one after the other."""
    group = np.repeat(np.arange(len(counts)), counts)
    slot = np.concatenate([np.arange(count) for count in counts])
    return torch.from_numpy(group).to(device), torch.from_numpy(slot).to(device)
