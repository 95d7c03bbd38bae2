"""What a backbone would be, told without memory for its weights."""

from __future__ import annotations

from dataclasses import dataclass

from fedprompt.errors import InputError
from fedprompt.models.weights import blueprint


@dataclass(frozen=True)
class Outline:
    """Sizes of a Vision Transformer: width, blocks, tokens per image, and numbers in its weights."""

    width: int
    depth: int
    tokens: int
    weights: int


def outline(name: str, image_size: int) -> Outline | None:
    """Return the sizes of timm's ``name``, or None where it is no Vision Transformer: ``create_backbone`` says why."""
    try:
        model = blueprint(name, image_size)
    except InputError:
        return None
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    return Outline(model.embed_dim, len(model.blocks), tokens, sum(p.numel() for p in model.parameters()))
