"""Trainable kinds: what is trained beside the head, and how it enters the frozen backbone.

A kind says which params it starts with, which block is the lowest that it touches, whether it needs the query feature
of the backbone without prompts, and how stacked params [G, ...] and a batch become class features [M, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.models.backbone import Backbone
from fedprompt.models.batch import Batch
from fedprompt.models.params import Params

# Prompts are gathered by index_select: its gradient adds up in a fixed order, unlike that of plain indexing on threads.
Features = tuple[Tensor, Tensor, Tensor | None]  # class features [M, D], penalty [G], selected prompts bool [G, P]


@dataclass(frozen=True)
class PromptOptions:
    """How many prompts, where they enter, and how a pool is searched (configuration section ``prompt``)."""

    kind: str
    length: int = 10
    layer: int = 0
    pool_size: int = 20
    top_k: int = 10
    selection: str = "batch"
    similarity: float = 0.01


class Kind(Protocol):
    """What the rest of the code asks of a trainable kind."""

    layer: int  # tokens before this block depend on nothing that is trained
    needs_query: bool

    def init(self, rng: np.random.Generator) -> Params:
        """Draw the params at their start."""

    def features(self, params: Params, batch: Batch) -> Features:
        """Turn stacked params [G, ...] and a batch into class features."""


_KINDS: dict[str, Callable[[Backbone, PromptOptions], Kind]] = {}


def kind(name: str) -> Callable[[type], type]:
    """Register a trainable kind under the name that ``prompt.kind`` gives."""

    def register(cls: type) -> type:
        _KINDS[name] = cls
        return cls

    return register


def make_kind(backbone: Backbone, options: PromptOptions) -> Kind:
    """Return the kind that ``options.kind`` names, for this backbone."""
    return _KINDS[options.kind](backbone, options)


def uniform_prompts(rng: np.random.Generator, shape: tuple[int, ...], backbone: Backbone) -> Tensor:
    """Draw prompts uniformly in ±sqrt(6 / (3 p^2 + D)), p the patch size: the start of visual prompt tuning."""
    bound = math.sqrt(6 / (3 * backbone.patch_size**2 + backbone.width))
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))


def insert(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Put prompts [M, L, D] behind the class token of tokens [M, T, D]."""
    return torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)


def tokens_before(backbone: Backbone, layer: int, batch: Batch) -> Tensor:
    """Tokens [M, T, D] before block ``layer``, from the batch where they were computed before, else from its images."""
    if batch.tokens is not None:
        return batch.tokens
    with torch.no_grad():
        return backbone.run(backbone.embed(batch.images), 0, layer)


def query_of(backbone: Backbone, batch: Batch) -> Tensor:
    """Class features [M, D] of the backbone without prompts, from the batch where they were computed before."""
    if batch.query is not None:
        return batch.query
    with torch.no_grad():
        return backbone.class_feature(backbone.embed(batch.images), 0)


def no_penalty(batch: Batch, like: Tensor) -> Tensor:
    """A penalty of zero for every group."""
    return like.new_zeros(len(batch.counts))


@kind("none")
class NoPrompts:
    """No prompts: the head sees the frozen backbone's class feature, so no block runs during training."""

    needs_query = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.layer = backbone, backbone.depth

    def init(self, rng: np.random.Generator) -> Params:
        return {}

    def features(self, params: Params, batch: Batch) -> Features:
        query = query_of(self.backbone, batch)
        return query, no_penalty(batch, query), None


@kind("prompt")
class ShallowPrompt:
    """``prompt`` [L, D] enters once, before block ``layer``, and runs along to the end (VPT-shallow at layer 0)."""

    needs_query = False

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.layer, self.length = backbone, options.layer, options.length

    def init(self, rng: np.random.Generator) -> Params:
        return {"prompt": uniform_prompts(rng, (self.length, self.backbone.width), self.backbone)}

    def features(self, params: Params, batch: Batch) -> Features:
        tokens = tokens_before(self.backbone, self.layer, batch)
        tokens = insert(params["prompt"].index_select(0, batch.group), tokens)
        features = self.backbone.class_feature(tokens, self.layer)
        return features, no_penalty(batch, features), None


@kind("deep")
class DeepPrompt:
    """``deep`` [blocks, L, D]: new prompts take the old ones' place before every block from ``layer`` on (VPT-deep)."""

    needs_query = False

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.layer, self.length = backbone, options.layer, options.length

    def init(self, rng: np.random.Generator) -> Params:
        shape = (self.backbone.depth - self.layer, self.length, self.backbone.width)
        return {"deep": uniform_prompts(rng, shape, self.backbone)}

    def features(self, params: Params, batch: Batch) -> Features:
        tokens = tokens_before(self.backbone, self.layer, batch)
        last = self.backbone.depth - 1
        prompts = params["deep"].index_select(0, batch.group)  # [M, blocks, L, D]
        for block in range(self.layer, self.backbone.depth):
            tokens = insert(prompts[:, block - self.layer], tokens)
            if block < last:
                tokens = self.backbone.run(tokens, block, block + 1)
                tokens = torch.cat([tokens[:, :1], tokens[:, 1 + self.length :]], dim=1)
        features = self.backbone.class_feature(tokens, last)
        return features, no_penalty(batch, features), None


@kind("pool")
class PromptPool:
    """``pool`` [P, D] of which every batch (or instance) takes its ``top_k`` best, found with ``query_proj`` [D, D].

    similarity = cos(W q(x), p_k) with W = query_proj. Each sample votes for its k best prompts; with
    ``selection: batch`` the k prompts with the most votes serve the whole batch (equal votes: larger summed similarity,
    then lower index), with ``instance`` every sample has its own k. The penalty is λ times the batch mean of the summed
    similarities of the selected prompts (PFPT, Weng et al. 2024; its published code adds it, as λ > 0 does here).
    """

    needs_query = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.options, self.layer = backbone, options, options.layer

    def init(self, rng: np.random.Generator) -> Params:
        width = self.backbone.width
        pool = uniform_prompts(rng, (self.options.pool_size, width), self.backbone)
        query_proj = torch.from_numpy(rng.uniform(-1, 1, (width, width)).astype(np.float32))
        return {"pool": pool, "query_proj": query_proj}

    def features(self, params: Params, batch: Batch) -> Features:
        pool = params["pool"]  # [G, P, D]
        similarity = self._similarity(pool, params["query_proj"], batch)  # [M, P]
        chosen = self._choose(similarity.detach(), batch)  # [M, k]
        rows = batch.group[:, None] * pool.shape[1] + chosen  # of the pools, one after the other
        prompts = pool.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)  # [M, k, D]
        tokens = insert(prompts, tokens_before(self.backbone, self.layer, batch))
        features = self.backbone.class_feature(tokens, self.layer)
        penalty = self.options.similarity * batch.group_mean(similarity.gather(1, chosen).sum(1))
        selected = torch.zeros(pool.shape[:2], dtype=torch.bool, device=pool.device)
        selected[batch.group[:, None].expand_as(chosen), chosen] = True
        return features, penalty, selected

    def _similarity(self, pool: Tensor, query_proj: Tensor, batch: Batch) -> Tensor:
        query = batch.padded(query_of(self.backbone, batch))  # [G, B, D]
        projected = F.normalize(torch.bmm(query, query_proj.transpose(1, 2)), dim=-1)
        similarity = torch.bmm(projected, F.normalize(pool, dim=-1).transpose(1, 2))  # [G, B, P]
        return similarity[batch.group, batch.slot]

    def _choose(self, similarity: Tensor, batch: Batch) -> Tensor:
        """Indices [M, k] of each sample's prompts."""
        k = min(self.options.top_k, similarity.shape[1])
        best = similarity.sort(dim=1, descending=True, stable=True).indices[:, :k]
        if self.options.selection == "instance":
            return best
        groups, size = len(batch.counts), similarity.shape[1]
        votes = torch.zeros(groups * size, device=similarity.device)
        votes = votes.index_add(0, (batch.group[:, None] * size + best).flatten(), votes.new_ones(best.numel()))
        votes = votes.view(groups, size)
        summed = similarity.new_zeros(groups, size).index_add(0, batch.group, similarity)
        # most votes first, then larger summed similarity, then lower index: two stable sorts, the minor key first
        minor = summed.sort(dim=1, descending=True, stable=True).indices
        major = votes.gather(1, minor).sort(dim=1, descending=True, stable=True).indices
        return minor.gather(1, major)[:, :k][batch.group]
