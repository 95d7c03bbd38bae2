"""What the rest of the code asks of a frozen pretrained model: tokens of inputs, blocks that run on them, a feature.

``vit.py`` is the one for timm's Vision Transformers. A language model is another class with the same methods; its
``embed`` takes token ids and returns a mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# a batch of inputs as ``Inputs.arrays`` gives them, samples first: images are one tensor
InputTensors = tuple[Tensor, ...]
Hook = Callable[[Tensor], Tensor]

AT_ONCE = 64  # samples that are embedded together: as floats, images take four times their bytes


@dataclass(frozen=True)
class Tokens:
    """What runs through the blocks: tokens [M, T, D] of M samples.

    ``mask`` is bool [M, T], False where a token only pads a shorter sample, at its end; None: nothing is padded.
    ``prompts`` of the tokens are prompts. They stand together, at the backbone's ``prompt_position``.
    """

    values: Tensor
    mask: Tensor | None = None
    prompts: int = 0

    def with_prompts(self, prompts: Tensor, at: int) -> Tokens:
        """Insert prompts [M, L, D] before token ``at``."""
        mask = self.mask
        if mask is not None:
            mask = torch.cat([mask[:, :at], mask.new_ones(prompts.shape[:2]), mask[:, at:]], dim=1)
        values = torch.cat([self.values[:, :at], prompts, self.values[:, at:]], dim=1)
        return Tokens(values, mask, self.prompts + prompts.shape[1])

    def without_prompts(self, at: int) -> Tokens:
        """Take out the prompts, which stand at ``at``."""
        if not self.prompts:
            return self
        behind = at + self.prompts
        mask = None if self.mask is None else torch.cat([self.mask[:, :at], self.mask[:, behind:]], dim=1)
        return Tokens(torch.cat([self.values[:, :at], self.values[:, behind:]], dim=1), mask)

    def having(self, values: Tensor) -> Tokens:
        """The same with other values, of the same tokens."""
        return replace(self, values=values)

    def index_select(self, at: Tensor) -> Tokens:
        """The tokens of the samples ``at``, int64 [m]."""
        mask = None if self.mask is None else self.mask.index_select(0, at)
        return replace(self, values=self.values.index_select(0, at), mask=mask)


@dataclass(frozen=True)
class Change:
    """What is added inside one block, as functions of what is there; None: nothing is added."""

    query: Hook | None = None  # to the queries [M, T, inner], of the block's normed tokens [M, T, D]
    value: Hook | None = None  # to the values [M, T, inner], of the same
    mlp: Hook | None = None  # to the MLP's output [M, T, D] before layer scale and residual, of that output


class Backbone(Protocol):
    """A pretrained model whose weights never change, cut at its tokens, its blocks and its read-out."""

    width: int  # D, of a token and of the feature
    depth: int  # number of blocks
    classes: int  # what ``logits`` gives: classes, or the width of a joint space with texts; 0: there is no such head
    tokens_per_sample: int  # T of the longest sample, without prompts
    prefix: int  # how many of a sample's tokens come before its own: class token, registers
    prompt_position: int  # before which token prompts are inserted: 1 behind a class token, else 0
    prompt_bound: float  # prompts that are drawn uniformly lie within plus and minus this
    fusable: bool  # whether samples of several clients can go through as one batch
    device: torch.device  # where it computes

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, in order."""

    @property
    def bytes(self) -> int:
        """Size of ``weights``."""

    def embed(self, inputs: InputTensors) -> Tokens:
        """Turn a batch of inputs into tokens before block 0."""

    def run(self, tokens: Tokens, first: int, last: int) -> Tokens:
        """Run blocks first, ..., last - 1. Padding changes nothing for the other tokens."""

    def read_out(self, tokens: Tokens) -> Tensor:
        """Features [M, D] of tokens behind the last block, float32. Prompts are not pooled."""

    def features_from(self, tokens: Tokens, first: int, changes: Sequence[Change] | None = None) -> Tensor:
        """Run all blocks from ``first`` on, each with its change where there are any, and read out: features [M, D].

        Changes only where ``changeable_from(first)``. What the read-out does not need is not computed.
        """

    def logits(self, features: Tensor) -> Tensor:
        """What the model's own head makes of features: [M, classes]."""

    def changeable_from(self, first: int) -> bool:
        """Whether all blocks from ``first`` on are of a form that changes can be put into."""

    def projection_widths(self, block: int) -> tuple[int, int]:
        """Widths of all queries and of all values of a block."""

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights but those of the model's own head, by name: what full fine-tuning trains and sends."""

    def hollow(self) -> nn.Module:
        """A module from inputs to features, called with a batch's arrays, whose weights must be given at each call.

        Its weights are called ``module.{name}`` for each name of ``weights``.
        """


@runtime_checkable
class ImageBackbone(Backbone, Protocol):
    """One that eats images, of any size: they are resized to ``image_size / crop`` and cut in the centre."""

    image_size: int
    crop: float

    def embed_pixels(self, pixels: Tensor) -> Tokens:
        """Turn pixels [M, 1 or 3, S, S] from 0 to 1, S the ``image_size``, into tokens before block 0."""


class Hollow(nn.Module):
    """Inputs to features as one module without weights: a weight that is not given fails loudly.

    ``attribute`` is where the backbone keeps the module with its weights.
    """

    def __init__(self, backbone: Backbone, attribute: str) -> None:
        super().__init__()
        whole: nn.Module = getattr(backbone, attribute)
        hollow = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), False) for w in whole.parameters()}
        self.module = copy.deepcopy(whole, hollow)
        self._backbone = copy.copy(backbone)
        setattr(self._backbone, attribute, self.module)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._backbone.features_from(self._backbone.embed(inputs), 0)


def in_chunks(inputs: InputTensors) -> Iterable[InputTensors]:
    """A batch of inputs, a few at a time."""
    return zip(*(array.split(AT_ONCE) for array in inputs), strict=True)


@torch.no_grad()
def features_of(backbone: Backbone, inputs: InputTensors) -> Tensor:
    """Features [M, D] of inputs without prompts, computed a few at a time."""
    return torch.cat([backbone.features_from(backbone.embed(chunk), 0) for chunk in in_chunks(inputs)])
