"""Kinds with no prompts (``none``) or a fixed number (``prompt``, ``deep``: visual prompt tuning, Jia et al. 2022)."""

from __future__ import annotations

import numpy as np
import torch

from fedprompt.models.backbones.base import Backbone
from fedprompt.models.batch import Batch
from fedprompt.models.kinds.base import (
    Features,
    PromptOptions,
    layer_within,
    no_penalty,
    query_of,
    tokens_before,
)
from fedprompt.models.kinds.registry import kind
from fedprompt.models.kinds.start import check_start, draw_prompts
from fedprompt.models.params import Params


@kind("none", "nothing: the head sees the frozen backbone's features", rates={"adam": (1e-3, 3e-3)})
class NoPrompts:
    """No prompts: the head sees the frozen backbone's feature, so no block runs during training."""

    needs_query = True
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.layer = backbone, backbone.depth

    def init(self, rng: np.random.Generator) -> Params:
        return {}

    def features(self, params: Params, batch: Batch) -> Features:
        query = query_of(self.backbone, batch)
        return query, no_penalty(batch, query), None


@kind(
    "prompt",
    "prompt.length tokens that enter before block prompt.layer",
    holds_tokens=True,
    rates={"adam": (1e-3, 3e-3)},  # where validation preferred others than a pool's (studies/comparison)
    source="Jia et al., ECCV 2022 (VPT-shallow)",
)
class ShallowPrompt:
    """``prompt`` [L, D] enters once, before block ``layer``, and runs along to the end (VPT-shallow at layer 0)."""

    needs_query = False
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.options = backbone, options
        self.layer, self.length = layer_within(backbone, options), options.length
        check_start(backbone, options)

    def init(self, rng: np.random.Generator) -> Params:
        return {"prompt": draw_prompts(rng, self.length, self.layer, self.backbone, self.options)}

    def features(self, params: Params, batch: Batch) -> Features:
        tokens = tokens_before(self.backbone, self.layer, batch)
        tokens = tokens.with_prompts(params["prompt"].index_select(0, batch.group), self.backbone.prompt_position)
        features = self.backbone.features_from(tokens, self.layer)
        return features, no_penalty(batch, features), None


@kind(
    "deep",
    "prompt.length new tokens before every block from prompt.layer on",
    holds_tokens=True,
    source="Jia et al., ECCV 2022 (VPT-deep)",
)
class DeepPrompt:
    """``deep`` [blocks, L, D]: new prompts take the old ones' place before every block from ``layer`` on (VPT-deep)."""

    needs_query = False
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.options = backbone, options
        self.layer, self.length = layer_within(backbone, options), options.length
        check_start(backbone, options)

    def init(self, rng: np.random.Generator) -> Params:
        blocks = range(self.layer, self.backbone.depth)
        drawn = [draw_prompts(rng, self.length, block, self.backbone, self.options) for block in blocks]
        return {"deep": torch.stack(drawn)}

    def features(self, params: Params, batch: Batch) -> Features:
        tokens = tokens_before(self.backbone, self.layer, batch)
        last, at = self.backbone.depth - 1, self.backbone.prompt_position
        prompts = params["deep"].index_select(0, batch.group)  # [M, blocks, L, D]
        for block in range(self.layer, self.backbone.depth):
            tokens = tokens.with_prompts(prompts[:, block - self.layer], at)
            if block < last:
                tokens = self.backbone.run(tokens, block, block + 1).without_prompts(at)
        features = self.backbone.features_from(tokens, last)
        return features, no_penalty(batch, features), None
