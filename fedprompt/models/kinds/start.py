"""How prompts are drawn at their start: uniformly, or like the tokens that they will stand among (``prompt.init``)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedprompt.models.backbones.vit import AT_ONCE, Backbone
from fedprompt.models.kinds.base import PromptOptions


def draw_prompts(
    rng: np.random.Generator, count: int, block: int, backbone: Backbone, options: PromptOptions
) -> Tensor:
    """Draw ``count`` prompts [count, D] that enter before ``block``.

    ``uniform``: in ±sqrt(6 / (3 p^2 + D)), p the patch size, as in visual prompt tuning (Jia et al. 2022).
    ``patches`` and ``class``: normal, coordinate by coordinate with the mean and standard deviation of the patches' (or
    the class) tokens of the public images before that block.
    """
    shape = (count, backbone.width)
    if options.init == "uniform":
        bound = math.sqrt(6 / (3 * backbone.patch_size**2 + backbone.width))
        drawn = rng.uniform(-bound, bound, shape)
    else:
        tokens = _tokens(backbone, options, block).cpu().numpy()
        drawn = rng.normal(tokens.mean(axis=0), tokens.std(axis=0), shape)
    return torch.from_numpy(drawn.astype(np.float32))


@torch.no_grad()
def _tokens(backbone: Backbone, options: PromptOptions, block: int) -> Tensor:
    """The public images' class or patches' tokens [m, D] before ``block``."""
    tokens = [
        backbone.run(backbone.embed(chunk), 0, block) for chunk in torch.from_numpy(options.public).split(AT_ONCE)
    ]
    which = slice(0, 1) if options.init == "class" else slice(backbone.prefix, None)
    return torch.cat([x[:, which] for x in tokens]).flatten(0, 1).float()
