"""Kinds that change blocks from inside: ``adapter`` and ``lora``, for several groups at once by batched products.

Params are named per block, by its number in the whole backbone, and their first axis counts hidden units: units can be
reordered, or matched between clients as sets, and blocks may differ in their number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone, Change, Hook
from fedprompt.models.batch import Batch
from fedprompt.models.kinds.base import Features, PromptOptions, layer_within, no_penalty, tokens_before
from fedprompt.models.kinds.registry import kind
from fedprompt.models.params import Params


class _ChangedBlocks:
    """What adapter and LoRA share: a change in every block from ``prompt.layer`` on."""

    needs_query = False
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone, self.layer, self.rank = backbone, layer_within(backbone, options), options.rank
        if not backbone.changeable_from(self.layer):
            raise InputError(
                f"prompt.kind: '{options.kind}' needs plain pre-norm blocks, and this backbone (backbone.name) "
                "has others; allowed: none, prompt, deep, pool, visual, full"
            )

    def init(self, rng: np.random.Generator) -> Params:
        params: Params = {}
        for block in range(self.layer, self.backbone.depth):
            params |= self._start(rng, block)
        return params

    def features(self, params: Params, batch: Batch) -> Features:
        tokens = tokens_before(self.backbone, self.layer, batch)
        changes = [self._change(params, block, batch) for block in range(self.layer, self.backbone.depth)]
        features = self.backbone.features_from(tokens, self.layer, changes)
        return features, no_penalty(batch, features), None

    def _start(self, rng: np.random.Generator, block: int) -> Params:
        raise NotImplementedError

    def _change(self, params: Params, block: int, batch: Batch) -> Change:
        raise NotImplementedError

    def _inward(self, rng: np.random.Generator) -> Tensor:
        """Weights [r, D] into the hidden units, uniform in ±1/sqrt(D) like torch's Linear."""
        bound = 1 / math.sqrt(self.backbone.width)
        return torch.from_numpy(rng.uniform(-bound, bound, (self.rank, self.backbone.width)).astype(np.float32))


@kind(
    "adapter",
    "a bottleneck of prompt.rank units behind the MLP of each block from prompt.layer on",
    rates={"adam": (1e-3, 3e-3)},
    source="Houlsby et al., ICML 2019; Pfeiffer et al., EACL 2021",
)
class Adapter(_ChangedBlocks):
    """A bottleneck behind the MLP of each block (Houlsby et al. 2019, placed as by Pfeiffer et al. 2021).

    The MLP's output y becomes y + gelu(y Aᵀ + a) B + b with A = ``adapter.{block}.down`` [r, D], a = ``.down_bias``
    [r], B = ``.up`` [r, D] and b = ``.bias`` [D]. All but A start at zero, so that at first nothing is changed.
    """

    def _start(self, rng: np.random.Generator, block: int) -> Params:
        return {
            f"adapter.{block}.down": self._inward(rng),
            f"adapter.{block}.down_bias": torch.zeros(self.rank),
            f"adapter.{block}.up": torch.zeros(self.rank, self.backbone.width),
            f"adapter.{block}.bias": torch.zeros(self.backbone.width),
        }

    def _change(self, params: Params, block: int, batch: Batch) -> Change:
        names = ("down", "down_bias", "up", "bias")
        down, down_bias, up, bias = (params[f"adapter.{block}.{name}"] for name in names)

        def bottleneck(y: Tensor) -> Tensor:
            hidden = F.gelu(torch.baddbmm(down_bias[:, None], y, down.transpose(1, 2)))
            return torch.baddbmm(bias[:, None], hidden, up)

        return Change(mlp=_by_group(bottleneck, batch))


@kind(
    "lora",
    "a change of rank prompt.rank to queries and values of each block from prompt.layer on",
    rates={"adam": (1e-3, 3e-4)},
    source="Hu et al., ICLR 2022",
)
class LoRA(_ChangedBlocks):
    """A change of low rank to the query and value projections of each block (Hu et al. 2022, α = r).

    For x the normed tokens, x A_qᵀ B_q is added to the queries, with A_q = ``lora.{block}.query.a`` [r, D] and
    B_q = ``lora.{block}.query.b`` [r, inner]; the same with ``value``. B starts at zero, so that at first nothing is
    changed.
    """

    def _start(self, rng: np.random.Generator, block: int) -> Params:
        params = {}
        for part, inner in zip(("query", "value"), self.backbone.projection_widths(block), strict=True):
            params[f"lora.{block}.{part}.a"] = self._inward(rng)
            params[f"lora.{block}.{part}.b"] = torch.zeros(self.rank, inner)
        return params

    def _change(self, params: Params, block: int, batch: Batch) -> Change:
        def low_rank(part: str) -> Hook:
            a, b = params[f"lora.{block}.{part}.a"], params[f"lora.{block}.{part}.b"]
            return _by_group(lambda x: torch.bmm(torch.bmm(x, a.transpose(1, 2)), b), batch)

        return Change(query=low_rank("query"), value=low_rank("value"))


def _by_group(function: Hook, batch: Batch) -> Hook:
    """Turn a function from [G, n, I] to [G, n, O] into one on the tokens of all samples, [M, T, I] to [M, T, O]."""

    def on_tokens(x: Tensor) -> Tensor:
        padded = batch.padded(x)  # [G, B, T, I]
        return batch.unpadded(function(padded.flatten(1, 2)).unflatten(1, padded.shape[1:3]))

    return on_tokens
