"""The frozen Vision Transformer, cut into the pieces that prompt tuning needs: tokens, blocks, the class feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.models.linear import freeze_linears, frozen_linear

Hook = Callable[[Tensor], Tensor]
AT_ONCE = 64  # images that are turned into pixels and tokens together: as floats, images take four times their bytes
CLASSIFIER = "head."  # the backbone's own, behind the class feature: nothing of ours trains or sends it


@dataclass(frozen=True)
class Change:
    """What is added inside one block, as functions of what is there; None: nothing is added."""

    query: Hook | None = None  # to the queries [M, T, inner], of the block's normed tokens [M, T, D]
    value: Hook | None = None  # to the values [M, T, inner], of the same
    mlp: Hook | None = None  # to the MLP's output [M, T, D] before layer scale and residual, of that output


class Backbone:
    """A timm ViT whose weights never change.

    ``device`` is where it computes. ``autocast`` is the dtype of its matrix products, or None for float32.
    """

    def __init__(
        self,
        vit: nn.Module,
        image_size: int,
        *,
        crop: float = 1.0,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.vit = vit.to(device).eval().requires_grad_(False)
        freeze_linears(self.vit.blocks)
        self.image_size, self.crop = image_size, crop
        self.device, self.autocast = torch.device(device), autocast
        self.depth: int = len(vit.blocks)
        self.width: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.classes: int = getattr(vit.head, "out_features", 0)  # of the backbone's own classifier; 0: it has none
        self.prefix: int = vit.num_prefix_tokens  # the class token, and registers where there are any
        self.tokens_per_image: int = self.prefix + vit.patch_embed.num_patches
        config = vit.pretrained_cfg or {}
        self.mean, self.std = ([float(x) for x in config.get(name, (0.5, 0.5, 0.5))] for name in ("mean", "std"))
        self._mean, self._std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (self.mean, self.std))
        self._short_last_block = _is_plain(vit.blocks[-1])

    @property
    def bytes(self) -> int:
        """Size of the weights that full fine-tuning would have to send: all but the backbone's own classifier."""
        weights = [p for name, p in self.vit.named_parameters() if not name.startswith(CLASSIFIER)]
        return sum(p.numel() * p.element_size() for p in weights)

    def _precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def embed(self, images: Tensor) -> Tensor:
        """Turn uint8 images [M, H, W, 1 or 3] into tokens [M, T, D]: class token, (registers,) patches, positions."""
        chunks = images.split(AT_ONCE)
        return torch.cat([self.embed_pixels(to_pixels(x.to(self.device), self.image_size, self.crop)) for x in chunks])

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Turn pixels [M, 1 or 3, S, S] from 0 to 1, S the ``image_size``, into tokens [M, T, D]."""
        x = pixels.expand(-1, 3, -1, -1).sub(self._mean).div_(self._std)
        with self._precision():
            return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(x)))

    def run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Run blocks start, ..., stop - 1 on tokens [M, T, D]."""
        with self._precision():
            for block in self.vit.blocks[start:stop]:
                tokens = block(tokens)
        return tokens

    def class_feature(self, tokens: Tensor, start: int) -> Tensor:
        """Run the blocks from ``start`` to the end and return h(x) [M, D]: the class token after the final norm."""
        if self._short_last_block and start < self.depth:
            tokens = self.run(tokens, start, self.depth - 1)
            with self._precision():
                token = run_block(self.vit.blocks[-1], tokens, Change(), class_token_only=True)[:, 0]
        else:
            token = self.run(tokens, start, self.depth)[:, 0]
        return self._feature(token)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return h(x) [M, D] of uint8 images [M, H, W, 1 or 3], a few at a time."""
        return torch.cat([self.class_feature(self.embed(chunk), 0) for chunk in images.split(AT_ONCE)])

    def changed_class_feature(self, tokens: Tensor, start: int, changes: Sequence[Change]) -> Tensor:
        """Run the blocks from ``start`` to the end, each with its change, and return h(x) [M, D].

        Only where ``plain_from(start)``; of the last block only the class token is computed.
        """
        *blocks, last = self.vit.blocks[start:]
        *below, top = changes
        with self._precision():
            for block, change in zip(blocks, below, strict=True):
                tokens = run_block(block, tokens, change)
            token = run_block(last, tokens, top, class_token_only=True)[:, 0]
        return self._feature(token)

    def plain_from(self, start: int) -> bool:
        """Whether all blocks from ``start`` on are of the one form that changes can be put into."""
        return all(_is_plain(block) for block in self.vit.blocks[start:])

    def _feature(self, token: Tensor) -> Tensor:
        with self._precision():
            return self.vit.fc_norm(self.vit.norm(token)).float()

    def logits(self, features: Tensor) -> Tensor:
        """The backbone's own class scores [M, classes] for class features [M, D]."""
        with self._precision():
            return self.vit.head(features).float()


def to_pixels(images: Tensor, image_size: int, crop: float) -> Tensor:
    """Turn uint8 images [M, H, W, channels] into pixels [M, channels, S, S] from 0 to 1: resized, centre-cropped."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    resized = round(image_size / crop)
    if x.shape[-2:] != (resized, resized):
        shrinks = max(x.shape[-2:]) > resized
        x = F.interpolate(x, (resized, resized), mode="bilinear", align_corners=False, antialias=shrinks)
    margin = (resized - image_size) // 2
    return x[..., margin : margin + image_size, margin : margin + image_size]


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's pre-norm block with plain attention, which ``run_block`` spells out."""
    from fedprompt.models.weights.timm_import import import_timm

    transformer = import_timm().models.vision_transformer
    attention = getattr(block, "attn", None)
    plain = type(block) is transformer.Block and type(attention) is transformer.Attention
    return plain and getattr(attention, "gate", None) is None


def run_block(block: nn.Module, tokens: Tensor, change: Change, *, class_token_only: bool = False) -> Tensor:
    """Run timm's plain pre-norm block with a change on tokens [M, T, D].

    With ``class_token_only`` just the class token [M, 1, D] comes out: one query, the keys and values of all tokens.
    """
    attention = block.attn
    normed = block.norm1(tokens)
    if class_token_only:
        tokens, asking = tokens[:, :1], normed[:, :1]
    else:
        asking = normed
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = weight.shape[0] // 3
    q = frozen_linear(asking, weight[:inner], None if bias is None else bias[:inner])
    k, v = frozen_linear(normed, weight[inner:], None if bias is None else bias[inner:]).split(inner, dim=-1)
    if change.query is not None:
        q = q + change.query(asking)
    if change.value is not None:
        v = v + change.value(normed)
    q, k, v = (x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    q, k = attention.q_norm(q), attention.k_norm(k)
    x = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2).flatten(2)
    x = attention.proj(getattr(attention, "norm", nn.Identity())(x))
    tokens = tokens + block.ls1(x)
    y = block.mlp(block.norm2(tokens))
    if change.mlp is not None:
        y = y + change.mlp(y)
    return tokens + block.ls2(y)
