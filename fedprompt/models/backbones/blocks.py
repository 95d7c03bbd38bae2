"""One block of timm's pre-norm Vision Transformers, spelled out: with a change inside, or for its class token alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.models.backbones.base import Change
from fedprompt.models.backbones.families import Position, Timm
from fedprompt.models.linear import frozen_linear
from fedprompt.models.weights.timm_import import import_timm

UNCHANGED = Change()
_SAME = nn.Identity()  # in the place of a norm that a block does not have


def is_plain(block: Timm) -> bool:
    """Whether a block is one of timm's pre-norm blocks that ``run_block`` spells out."""
    timm = import_timm()
    models, layers = timm.models, timm.layers
    return (type(block), type(getattr(block, "attn", None))) in {
        (models.vision_transformer.Block, layers.Attention),
        (models.eva.EvaBlock, models.eva.EvaAttention),
        (models.eva.EvaBlock, layers.AttentionRope),
        (models.beit.Block, models.beit.Attention),
    }


def run_block(
    block: Timm,
    tokens: Tensor,
    change: Change = UNCHANGED,
    position: Position | None = None,
    *,
    class_token_only: bool = False,
) -> Tensor:
    """Run a plain block with a change on tokens [M, T, D].

    With ``class_token_only`` just the class token [M, 1, D] comes out: one query, the keys and values of all tokens.
    """
    normed = block.norm1(tokens)
    asking = normed
    if class_token_only:
        tokens, asking = tokens[:, :1], normed[:, :1]
    tokens = tokens + _scaled(block, 1, _attention(block.attn, asking, normed, change, position))
    y = block.mlp(block.norm2(tokens))
    if change.mlp is not None:
        y = y + change.mlp(y)
    return tokens + _scaled(block, 2, y)


def projection_widths(attention: Timm) -> tuple[int, int]:
    """Widths of all queries and of all values."""
    if attention.qkv is None:
        return attention.q_proj.out_features, attention.v_proj.out_features
    return attention.qkv.out_features // 3, attention.qkv.out_features // 3


def _attention(attention: Timm, asking: Tensor, normed: Tensor, change: Change, position: Position | None) -> Tensor:
    """What the tokens ``asking`` [M, A, D], all or the class token, take from all ``normed`` [M, T, D]."""
    q, k, v = _projected(attention, asking, normed)
    if change.query is not None:
        q = q + change.query(asking)
    if change.value is not None:
        v = v + change.value(normed)
    width = q.shape[-1] // attention.num_heads
    q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
    q_norm, k_norm = (getattr(attention, name, _SAME) for name in ("q_norm", "k_norm"))
    q, k, bias = q_norm(q), k_norm(k), None
    if position is not None:
        q, k = (position.rotated(attention, x).type_as(v) for x in (q, k))
        bias = position.bias_for(attention, q)
    if k.shape[1] < q.shape[1]:  # several heads of queries share one of keys and values
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale).transpose(1, 2).flatten(2)
    x = getattr(attention, "norm", _SAME)(x)
    if (gate := getattr(attention, "gate", None)) is not None:
        x = x * gate(asking).sigmoid()
    taken: Tensor = attention.proj(x)
    return taken


def _projected(attention: Timm, asking: Tensor, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, heads side by side."""
    if attention.qkv is None:
        return attention.q_proj(asking), attention.k_proj(normed), attention.v_proj(normed)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    if bias is None and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
    inner = weight.shape[0] // 3
    q = frozen_linear(asking, weight[:inner], None if bias is None else bias[:inner])
    k, v = frozen_linear(normed, weight[inner:], None if bias is None else bias[inner:]).split(inner, dim=-1)
    return q, k, v


def _scaled(block: Timm, part: int, x: Tensor) -> Tensor:
    """Attention's (part 1) or the MLP's (2) output after layer scale, where there is one."""
    if hasattr(block, f"ls{part}"):
        scaled: Tensor = getattr(block, f"ls{part}")(x)
        return scaled
    gamma: Tensor | None = getattr(block, f"gamma_{part}")
    return x if gamma is None else gamma * x
