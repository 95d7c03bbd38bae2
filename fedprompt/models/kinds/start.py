"""How prompts are drawn at their start: uniformly, or like the tokens that they will stand among (``prompt.init``)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone, Tokens, in_chunks
from fedprompt.models.kinds.base import PromptOptions


def check_start(backbone: Backbone, options: PromptOptions) -> None:
    """Raise InputError where prompts are to be drawn like class tokens, and this backbone has none."""
    if options.init == "class" and not backbone.prompt_position:
        raise InputError(
            "prompt.init: 'class' needs a class token, and this backbone (backbone.name) has none; allowed: uniform, "
            "patches"
        )


def draw_prompts(
    rng: np.random.Generator, count: int, block: int, backbone: Backbone, options: PromptOptions
) -> Tensor:
    """Draw ``count`` prompts [count, D] that enter before ``block``.

    ``uniform``: within ± the backbone's ``prompt_bound``. ``patches`` and ``class``: normal, coordinate by coordinate
    with the mean and standard deviation of the patches' (or the class) tokens of the public samples before that block.
    """
    shape = (count, backbone.width)
    if options.init == "uniform":
        drawn = rng.uniform(-backbone.prompt_bound, backbone.prompt_bound, shape)
    else:
        tokens = _tokens(backbone, options, block).cpu().numpy()
        drawn = rng.normal(tokens.mean(axis=0), tokens.std(axis=0), shape)
    return torch.from_numpy(drawn.astype(np.float32))


@torch.no_grad()
def _tokens(backbone: Backbone, options: PromptOptions, block: int) -> Tensor:
    """The public samples' class tokens, or those that are their own, [m, D] before ``block``; no padding."""
    assert options.public is not None, "config.public_shots is positive for this prompt.init"
    chunks = in_chunks(tuple(map(torch.from_numpy, options.public)))
    tokens = [backbone.run(backbone.embed(chunk), 0, block) for chunk in chunks]
    which = slice(0, 1) if options.init == "class" else slice(backbone.prefix, None)
    return torch.cat([x.values[:, which][_is_real(x)[:, which]] for x in tokens]).float()


def _is_real(tokens: Tokens) -> Tensor:
    """Which tokens are no padding, bool [M, T]."""
    if tokens.mask is not None:
        return tokens.mask
    return torch.ones(tokens.values.shape[:2], dtype=torch.bool, device=tokens.values.device)
