"""timm's Vision Transformers as frozen backbones: with or without a class token, registers, pooled read-outs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.models.backbones.base import AT_ONCE, Change, Hollow, InputTensors, Tokens
from fedprompt.models.backbones.blocks import UNCHANGED, is_plain, projection_widths, run_block
from fedprompt.models.backbones.families import Positions, Timm, embedded, is_beit, is_distilled, is_eva
from fedprompt.models.linear import freeze_linears

CLASSIFIERS = ("head.", "head_dist.")  # the backbone's own, behind the feature: nothing of ours trains or sends them


class ViT:
    """A timm Vision Transformer whose weights never change: a ``Backbone`` for images.

    ``device`` is where it computes. ``autocast`` is the dtype of its matrix products, or None for float32.

    The feature is what timm's own head reads: the class token, or a pooling of the image's tokens. Prompts are left out
    of the pooling. They act through attention alone, and the read-out keeps the form that it was pretrained in.
    """

    fusable = True

    def __init__(
        self,
        vit: Timm,
        image_size: int,
        *,
        crop: float = 1.0,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.vit: Timm = vit.to(device).eval().requires_grad_(False)
        freeze_linears(self.vit.blocks)
        self.image_size, self.crop = image_size, crop
        self.device, self.autocast = torch.device(device), autocast
        self.depth: int = len(vit.blocks)
        self.width: int = vit.embed_dim
        self.classes: int = 0 if is_distilled(vit) else getattr(vit.head, "out_features", 0)
        self.prefix: int = vit.num_prefix_tokens  # the class token, and registers where there are any
        self.prompt_position = 0 if getattr(vit, "cls_token", None) is None else 1
        self.tokens_per_sample: int = self.prefix + vit.patch_embed.num_patches
        # as in visual prompt tuning (Jia et al. 2022)
        self.prompt_bound = math.sqrt(6 / (3 * vit.patch_embed.patch_size[0] ** 2 + self.width))
        config = vit.pretrained_cfg or {}
        self.mean, self.std = ([float(x) for x in config.get(name, (0.5, 0.5, 0.5))] for name in ("mean", "std"))
        self._mean, self._std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (self.mean, self.std))
        self._is_eva, self._is_beit = is_eva(vit), is_beit(vit)
        self._reads_class_token = vit.global_pool == "token" and not is_distilled(vit)
        self._short_last_block = self._reads_class_token and is_plain(vit.blocks[-1])

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks, in order."""
        return list(self.vit.blocks)

    @property
    def bytes(self) -> int:
        """Size of the weights that full fine-tuning would have to send: all but the backbone's own classifier."""
        return sum(p.numel() * p.element_size() for p in self.weights().values())

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights but those of the backbone's own classifier."""
        return {name: p for name, p in self.vit.named_parameters() if not name.startswith(CLASSIFIERS)}

    def hollow(self) -> nn.Module:
        """A module from images to features whose weights, ``module.{name}``, must be given at each call."""
        return Hollow(self, "vit")

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def embed(self, inputs: InputTensors) -> Tokens:
        """Turn uint8 images [M, H, W, 1 or 3] into tokens [M, T, D]: class token, registers, patches, positions."""
        (images,) = inputs
        pixels = (to_pixels(x.to(self.device), self.image_size, self.crop) for x in images.split(AT_ONCE))
        return Tokens(torch.cat([self._embedded(x) for x in pixels]))

    def embed_pixels(self, pixels: Tensor) -> Tokens:
        """Turn pixels [M, 1 or 3, S, S] from 0 to 1, S the ``image_size``, into tokens [M, T, D]."""
        return Tokens(self._embedded(pixels))

    def _embedded(self, pixels: Tensor) -> Tensor:
        x = pixels.expand(-1, 3, -1, -1).sub(self._mean).div_(self._std)
        with self._precision():
            return embedded(self.vit, x)

    def run(self, tokens: Tokens, first: int, last: int) -> Tokens:
        """Run blocks first, ..., last - 1."""
        values = tokens.values
        with self._precision():
            positions = self._positions(tokens)
            for number in range(first, last):
                block = self.vit.blocks[number]
                if self._is_beit:  # whose own blocks know nothing of tokens that are no part of the image
                    values = run_block(block, values, position=positions.of(number))
                elif self._is_eva:
                    values = block(values, rope=positions.of(number).rope)
                else:
                    values = block(values)
        return tokens.having(values)

    def _positions(self, tokens: Tokens) -> Positions:
        return Positions(self.vit, tokens.prompts, self.prompt_position)

    def features_from(self, tokens: Tokens, first: int, changes: Sequence[Change] | None = None) -> Tensor:
        """Run all blocks from ``first`` on, each with its change where there are any: features h(x) [M, D].

        Of the last block only the class token is computed, where the feature is made of it alone.
        """
        if first == self.depth:
            return self.read_out(tokens)
        last, top = self.depth - 1, UNCHANGED
        if changes is None:
            if not self._short_last_block:
                return self.read_out(self.run(tokens, first, self.depth))
            tokens = self.run(tokens, first, last)
        else:
            *below, top = changes
            tokens = self._run_changed(tokens, first, below)
        with self._precision():
            position, short = self._positions(tokens).of(last), self._short_last_block
            values = run_block(self.vit.blocks[last], tokens.values, top, position, class_token_only=short)
        return self._normed(values[:, 0]) if short else self.read_out(tokens.having(values))

    def _run_changed(self, tokens: Tokens, first: int, changes: Sequence[Change]) -> Tokens:
        """Run as many blocks from ``first`` on as there are changes."""
        values = tokens.values
        with self._precision():
            positions = self._positions(tokens)
            for number, change in enumerate(changes, start=first):
                values = run_block(self.vit.blocks[number], values, change, positions.of(number))
        return tokens.having(values)

    def read_out(self, tokens: Tokens) -> Tensor:
        """The feature h(x) [M, D] of tokens behind the last block."""
        if self._reads_class_token:
            return self._normed(tokens.values[:, 0])
        own = tokens.without_prompts(self.prompt_position).values
        with self._precision():
            feature: Tensor = self.vit.forward_head(self.vit.norm(own), pre_logits=True)
        return feature.float()

    def _normed(self, token: Tensor) -> Tensor:
        with self._precision():
            feature: Tensor = self.vit.fc_norm(self.vit.norm(token))
        return feature.float()

    def logits(self, features: Tensor) -> Tensor:
        """The backbone's own class scores [M, classes] for features [M, D]; of CLIP: their place in the joint space."""
        with self._precision():
            logits: Tensor = self.vit.head(features)
        return logits.float()

    def changeable_from(self, first: int) -> bool:
        """Whether all blocks from ``first`` on are of the forms that changes can be put into."""
        return all(is_plain(block) for block in self.vit.blocks[first:])

    def projection_widths(self, block: int) -> tuple[int, int]:
        """Widths of all queries and of all values of a block."""
        return projection_widths(self.vit.blocks[block].attn)


def to_pixels(images: Tensor, image_size: int, crop: float) -> Tensor:
    """Turn uint8 images [M, H, W, channels] into pixels [M, channels, S, S] from 0 to 1: resized, centre-cropped."""
    x = images.permute(0, 3, 1, 2).float().div_(255)
    resized = round(image_size / crop)
    if x.shape[-2:] != (resized, resized):
        shrinks = max(x.shape[-2:]) > resized
        x = F.interpolate(x, (resized, resized), mode="bilinear", align_corners=False, antialias=shrinks)
    margin = (resized - image_size) // 2
    return x[..., margin : margin + image_size, margin : margin + image_size]
