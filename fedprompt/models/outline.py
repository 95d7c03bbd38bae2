"""What a backbone would be, told without memory for its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedprompt.models.timm_import import import_timm


@dataclass(frozen=True)
class Outline:
    """Sizes of a Vision Transformer: width, blocks, tokens per image, and numbers in its weights."""

    width: int
    depth: int
    tokens: int
    weights: int


def outline(name: str, image_size: int) -> Outline | None:
    """Return the sizes of timm's ``name``, or None where it is no Vision Transformer: ``create_backbone`` says why."""
    timm = import_timm()
    if not timm.is_model(name.partition(".")[0]):
        return None
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, img_size=image_size)
    except (TypeError, ValueError, AssertionError, RuntimeError):  # no such size, or no such weights
        return None
    if not isinstance(model, timm.models.vision_transformer.VisionTransformer):
        return None
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return Outline(model.embed_dim, len(model.blocks), tokens, sum(p.numel() for p in model.parameters()))
