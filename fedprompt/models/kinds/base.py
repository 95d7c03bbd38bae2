"""What a trainable kind is, and what several kinds share.

A kind says which params it starts with, which block is the lowest that it touches, whether it needs the query feature
of the backbone without prompts, and how stacked params [G, ...] and a batch become features [M, D]. Kinds gather
rows by index_select: its gradient adds up in a fixed order, unlike that of plain indexing on threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone, Tokens
from fedprompt.models.batch import Batch
from fedprompt.models.params import Params

Features = tuple[Tensor, Tensor, Tensor | None]  # features [M, D], penalty [G], selected prompts bool [G, P]


@dataclass(frozen=True)
class PromptOptions:
    """Which kind, of what size, where it enters, and how a pool is searched (configuration section ``prompt``).

    ``public``: arrays [m, ...] of the inputs whose tokens prompts are drawn like, unless ``init`` is ``uniform``.
    """

    kind: str
    length: int = 10
    layer: int = 0
    init: str = "uniform"
    pool_size: int = 20
    top_k: int = 10
    selection: str = "batch"
    query: str = "trained"
    similarity: float = 0.01
    rank: int = 8  # hidden units of an adapter, rank of a LoRA change
    channels: int = 16  # of a visual prompt's generator
    strength: float = 0.5  # how far a visual prompt moves a pixel at most
    public: tuple[np.ndarray, ...] | None = None


class Kind(Protocol):
    """What the rest of the code asks of a trainable kind."""

    layer: int  # tokens before this block depend on nothing that is trained
    needs_query: bool
    fusable: bool  # whether stacked params of several clients can go through the backbone as one batch

    def init(self, rng: np.random.Generator) -> Params:
        """Draw the params at their start."""

    def features(self, params: Params, batch: Batch) -> Features:
        """Turn stacked params [G, ...] and a batch into features."""


def layer_within(backbone: Backbone, options: PromptOptions) -> int:
    """Return ``prompt.layer``; InputError where it lies behind the backbone's last block."""
    if options.layer >= backbone.depth:
        raise InputError(f"prompt.layer: {options.layer}; allowed: 0 to {backbone.depth - 1} for this backbone")
    return options.layer


def tokens_before(backbone: Backbone, layer: int, batch: Batch) -> Tokens:
    """Tokens before block ``layer``, from the batch where they were computed before, else from its inputs."""
    if batch.tokens is not None:
        return batch.tokens
    with torch.no_grad():
        return backbone.run(backbone.embed(batch.given), 0, layer)


def query_of(backbone: Backbone, batch: Batch) -> Tensor:
    """Features [M, D] of the backbone without prompts, from the batch where they were computed before."""
    if batch.query is not None:
        return batch.query
    with torch.no_grad():
        return backbone.features_from(backbone.embed(batch.given), 0)


def no_penalty(batch: Batch, like: Tensor) -> Tensor:
    """A penalty of zero for every group."""
    return like.new_zeros(len(batch.counts))
