"""What differs between timm's families of Vision Transformers: positions, tokens before block 0, and what is refused.

Prompts have no place in the image. Rotary embeddings leave them as they are, like the class token, and relative
position biases between them and any token are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedprompt.models.weights.timm_import import import_timm

Timm = Any  # one of timm's modules, which say no types


def refusal(model: Timm) -> str | None:
    """Why prompts cannot be put into a timm model, as a part of a line; None where they can."""
    models = import_timm().models
    transformer, distilled = models.vision_transformer.VisionTransformer, models.deit.VisionTransformerDistilled
    if type(model) not in (transformer, distilled, models.eva.Eva, models.beit.Beit):
        return f"a {type(model).__name__}"
    if not model.global_pool:
        return "without a read-out"
    return None


def is_eva(vit: Timm) -> bool:
    """Whether blocks are given rotary positions: EVA, EVA-02, DINOv3, perception encoders."""
    return isinstance(vit, import_timm().models.eva.Eva)


def is_beit(vit: Timm) -> bool:
    """Whether attention has biases by relative position: BEiT."""
    return isinstance(vit, import_timm().models.beit.Beit)


def is_distilled(vit: Timm) -> bool:
    """Whether the feature is the mean of a class and a distillation token, each with a classifier of its own."""
    return hasattr(vit, "dist_token")


def embedded(vit: Timm, pixels: Tensor) -> Tensor:
    """Tokens [M, T, D] before block 0 of normalised pixels [M, 3, S, S]: class token, registers, patches, positions."""
    x = vit.patch_embed(pixels)
    if is_beit(vit):
        x = torch.cat((vit.cls_token.expand(len(x), -1, -1), x), dim=1)
        return x if vit.pos_embed is None else x + vit.pos_embed
    x = vit._pos_embed(x)
    tokens: Tensor = vit.norm_pre(x[0] if isinstance(x, tuple) else x)  # Eva gives its rotary embedding, too
    return tokens


@dataclass(frozen=True)
class Position:
    """What attention is told of where tokens stand, ``prompts`` of them being prompts at ``at``."""

    prompts: int
    at: int
    rope: Tensor | None = None  # [T - prefix, 2 width] or [heads, ...]: sines and cosines, prompts included
    bias: Tensor | None = None  # [1, heads, T, T] for all blocks, without prompts

    def rotated(self, attention: Timm, x: Tensor) -> Tensor:
        """Rotate queries or keys [M, heads, T, width], but for the prefix, as timm does."""
        prefix = getattr(attention, "num_prefix_tokens", 0)
        if self.rope is None or x.shape[2] <= prefix:  # the class token alone
            return x
        rotate = import_timm().layers.apply_rot_embed_cat
        behind = rotate(x[:, :, prefix:], self.rope, half=getattr(attention, "rotate_half", False))
        return torch.cat([x[:, :, :prefix], behind], dim=2)

    def bias_for(self, attention: Timm, q: Tensor) -> Tensor | None:
        """The bias that attention scores of queries [M, heads, T or 1, width] get; None: there is none."""
        bias = self.bias
        if getattr(attention, "relative_position_bias_table", None) is not None:
            own = attention._get_rel_pos_bias()
            bias = own if bias is None else bias + own
        if bias is None:
            return None
        for dim in (2, 3):
            before, behind = bias.split((self.at, bias.shape[dim] - self.at), dim=dim)
            size = [*bias.shape]
            size[dim] = self.prompts
            bias = torch.cat([before, bias.new_zeros(size), behind], dim=dim)
        return bias[:, :, : q.shape[2]].to(q.dtype)


class Positions:
    """Where tokens stand in a pass through some blocks of ``vit``, with ``prompts`` at ``at`` among them."""

    def __init__(self, vit: Timm, prompts: int, at: int) -> None:
        self._prompts, self._at = prompts, at
        rope = getattr(vit, "rope", None)
        self._rope = None if rope is None else _unrotated_first(_rope_of(vit), prompts)
        self._by_block = bool(getattr(vit, "rope_mixed", False))
        shared = getattr(vit, "rel_pos_bias", None)
        self._bias = None if shared is None else shared()

    def of(self, block: int) -> Position:
        """What the attention of one block, counted in the whole backbone, is told."""
        rope = self._rope[block] if self._rope is not None and self._by_block else self._rope
        return Position(self._prompts, self._at, rope, self._bias)


def _rope_of(vit: Timm) -> Tensor:
    is_known = hasattr(vit.rope, "feat_shape") and not vit.dynamic_img_size
    rope: Tensor = vit.rope.get_embed() if is_known else vit.rope.get_embed(shape=vit.patch_embed.grid_size)
    return rope


def _unrotated_first(rope: Tensor, count: int) -> Tensor:
    """Prepend ``count`` rotations by nothing, sine 0 and cosine 1.

    Prompts stand before the patches, and registers, if any, between. So behind the prefix that timm counts off come as
    many tokens that are not patches as there are prompts.
    """
    if not count:
        return rope
    size = (*rope.shape[:-2], count, rope.shape[-1] // 2)
    none = torch.cat([rope.new_zeros(size), rope.new_ones(size)], dim=-1)
    return torch.cat([none, rope], dim=-2)
