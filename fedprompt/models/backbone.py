"""The frozen Vision Transformer, cut into the pieces that prompt tuning needs: tokens, blocks, the class feature."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.image_size, self.crop = image_size, crop
        self.device, self.autocast = torch.device(device), autocast
        self.depth: int = len(vit.blocks)
        self.width: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.classes: int = getattr(vit.head, "out_features", 0)  # of the backbone's own classifier; 0: it has none
        self.tokens_per_image: int = vit.patch_embed.num_patches + vit.num_prefix_tokens
        config = vit.pretrained_cfg or {}
        self._mean = torch.tensor(config.get("mean", (0.5, 0.5, 0.5)), device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(config.get("std", (0.5, 0.5, 0.5)), device=device).view(1, 3, 1, 1)
        self._short_last_block = _is_plain(vit.blocks[-1])

    @property
    def bytes(self) -> int:
        """Size of the weights, which full fine-tuning would have to send."""
        return sum(p.numel() * p.element_size() for p in self.vit.parameters())

    def _precision(self) -> AbstractContextManager:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def embed(self, images: Tensor) -> Tensor:
        """Turn uint8 images [M, H, W, 1 or 3] into tokens [M, T, D]: class token, (registers,) patches, positions."""
        x = images.to(self.device).permute(0, 3, 1, 2).float().div_(255)
        resized = round(self.image_size / self.crop)
        if x.shape[-2:] != (resized, resized):
            shrinks = max(x.shape[-2:]) > resized
            x = F.interpolate(x, (resized, resized), mode="bilinear", align_corners=False, antialias=shrinks)
        margin = (resized - self.image_size) // 2
        x = x[..., margin : margin + self.image_size, margin : margin + self.image_size]
        x = (x.expand(-1, 3, -1, -1) - self._mean) / self._std
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
                token = _class_token_of_block(self.vit.blocks[-1], tokens)
        else:
            token = self.run(tokens, start, self.depth)[:, 0]
        with self._precision():
            return self.vit.fc_norm(self.vit.norm(token)).float()

    def logits(self, features: Tensor) -> Tensor:
        """The backbone's own class scores [M, classes] for class features [M, D]."""
        with self._precision():
            return self.vit.head(features).float()


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's pre-norm block with plain attention, which ``_class_token_of_block`` spells out."""
    from fedprompt.models.timm_import import import_timm

    transformer = import_timm().models.vision_transformer
    attention = getattr(block, "attn", None)
    plain = type(block) is transformer.Block and type(attention) is transformer.Attention
    return plain and getattr(attention, "gate", None) is None


def _class_token_of_block(block: nn.Module, tokens: Tensor) -> Tensor:
    """The class token [M, D] that a block puts out, from its own query and the keys and values of all tokens."""
    attention = block.attn
    m, t, _ = tokens.shape
    heads = attention.num_heads
    normed = block.norm1(tokens)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = weight.shape[0] // 3
    q = F.linear(normed[:, :1], weight[:inner], None if bias is None else bias[:inner])
    kv = F.linear(normed, weight[inner:], None if bias is None else bias[inner:])
    q = q.view(m, 1, heads, -1).transpose(1, 2)
    k, v = kv.view(m, t, 2, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    x = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2).reshape(m, inner)
    x = attention.proj(getattr(attention, "norm", nn.Identity())(x))
    token = tokens[:, 0] + block.ls1(x)
    return token + block.ls2(block.mlp(block.norm2(token)))
