"""Frozen blocks through ``torch.compile``: on a GPU it melts norms, scales, sums and activations into few kernels."""

from __future__ import annotations

from typing import Any

from fedprompt.models.backbones.base import Backbone


def compile_blocks(backbone: Backbone, **how: Any) -> None:
    """Compile the backbone's blocks in place; ``how`` are torch.compile's keywords, none of them for its defaults.

    Blocks are compiled one by one, not as a stack: all of them share one compiled form, so that compiling takes as long
    as for one block. Numbers of images may change from step to step: the second number that comes makes torch compile
    once more, for any number. Kinds that change blocks from inside (adapter, lora), and the last block where only its
    class token is computed, run as before.
    """
    for block in backbone.blocks:
        block.compile(**how)
