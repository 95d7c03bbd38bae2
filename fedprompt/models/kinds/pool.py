"""The kind ``pool``: prompts that are selected per batch or instance by their similarity to the query feature."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.models.backbones.base import Backbone
from fedprompt.models.batch import Batch
from fedprompt.models.kinds.base import (
    Features,
    PromptOptions,
    layer_within,
    query_of,
    tokens_before,
)
from fedprompt.models.kinds.registry import kind
from fedprompt.models.kinds.start import check_start, draw_prompts
from fedprompt.models.params import Params


@kind(
    "pool",
    "prompt.pool_size tokens of which every batch takes its prompt.top_k best",
    holds_tokens=True,
    source="Wang et al., CVPR 2022; Weng et al., 2024",
)
class PromptPool:
    """``pool`` [P, D] of which every batch (or instance) takes its ``top_k`` best, found with ``query_proj`` [D, D].

    similarity = cos(W q(x), p_k) with W = query_proj. Each sample votes for its k best prompts; with
    ``selection: batch`` the k prompts with the most votes serve the whole batch (equal votes: larger summed similarity,
    then lower index), with ``instance`` every sample has its own k. The penalty is λ times the batch mean of the summed
    similarities of the selected prompts (PFPT, Weng et al. 2024; its published code adds it, as λ > 0 does here).

    ``query: identity`` has W = 1 and no such tensor. Under ``frozen`` W is drawn as ever; that nobody trains it, and
    that it stays at home, is the method's business (``Setting.constants``).
    """

    needs_query = True
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.options, self.layer = backbone, options, layer_within(backbone, options)
        check_start(backbone, options)

    def init(self, rng: np.random.Generator) -> Params:
        width = self.backbone.width
        pool = draw_prompts(rng, self.options.pool_size, self.layer, self.backbone, self.options)
        if self.options.query == "identity":
            return {"pool": pool}
        query_proj = torch.from_numpy(rng.uniform(-1, 1, (width, width)).astype(np.float32))
        return {"pool": pool, "query_proj": query_proj}

    def features(self, params: Params, batch: Batch) -> Features:
        pool = params["pool"]  # [G, P, D]
        similarity = self._similarity(pool, params.get("query_proj"), batch)  # [M, P]
        chosen = self._choose(similarity.detach(), batch)  # [M, k]
        rows = batch.group[:, None] * pool.shape[1] + chosen  # of the pools, one after the other
        prompts = pool.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)  # [M, k, D]
        tokens = tokens_before(self.backbone, self.layer, batch)
        tokens = tokens.with_prompts(prompts, self.backbone.prompt_position)
        features = self.backbone.features_from(tokens, self.layer)
        penalty = self.options.similarity * batch.group_mean(similarity.gather(1, chosen).sum(1))
        selected = torch.zeros(pool.shape[:2], dtype=torch.bool, device=pool.device)
        selected[batch.group[:, None].expand_as(chosen), chosen] = True
        return features, penalty, selected

    def _similarity(self, pool: Tensor, query_proj: Tensor | None, batch: Batch) -> Tensor:
        query = batch.padded(query_of(self.backbone, batch))  # [G, B, D]
        if query_proj is not None:
            query = torch.bmm(query, query_proj.transpose(1, 2))
        projected = F.normalize(query, dim=-1)
        similarity = torch.bmm(projected, F.normalize(pool, dim=-1).transpose(1, 2))  # [G, B, P]
        return batch.unpadded(similarity)

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
