"""The classifier on top of the class feature, for many clients at once: stacked weights, batched products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedprompt.models.params import Params


@dataclass(frozen=True)
class HeadOptions:
    """Which classifier (configuration section ``head``); with ``prototypes`` there is none to train."""

    kind: str = "mlp"
    hidden: int = 512
    dropout: float = 0.5
    input: str = "features"
    scale: float = 50.0  # of the cosines with class prototypes


def init_head(options: HeadOptions, inputs: int, classes: int, rng: np.random.Generator) -> Params:
    """Draw ``head.*`` as torch's Linear starts: weights [out, in] and biases [out] uniform in ±1/sqrt(in)."""
    if options.kind == "prototypes":
        return {}
    sizes = [inputs, options.hidden, classes] if options.kind == "mlp" else [inputs, classes]
    params = {}
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        bound = 1 / math.sqrt(before)
        params[f"head.{number}.weight"] = _uniform(rng, bound, (after, before))
        params[f"head.{number}.bias"] = _uniform(rng, bound, (after,))
    return params


def apply_head(params: Params, x: Tensor, keep: Tensor | None) -> Tensor:
    """Class scores [G, B, K] of inputs x [G, B, D]; ``keep`` [G, B, hidden] are the dropout factors of this step.

    Linear(D, hidden) → Dropout → Linear(hidden, K), or one Linear(D, K), as in the published study.
    """
    x = _linear(params, 1, x)
    if "head.2.weight" in params:
        x = _linear(params, 2, x if keep is None else x * keep)
    return x


def _linear(params: Params, number: int, x: Tensor) -> Tensor:
    weight, bias = params[f"head.{number}.weight"], params[f"head.{number}.bias"]
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _uniform(rng: np.random.Generator, bound: float, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.uniform(-bound, bound, shape).astype(np.float32))


def dropout_factors(seeds: Tensor, step: int, width: int, hidden: int, p: float) -> Tensor:
    """Dropout factors [G, width, hidden], 0 or 1 / (1 - p), as a function of each client's seed and the step alone.

    A counter-based generator (the finaliser of MurmurHash3 on 32-bit words held in int64) instead of a stream: the same
    client gets the same factors on any device, in any group, at any group width. ``seeds`` int64 [G] below 2**32.
    """
    word = 0xFFFFFFFF
    unit = torch.arange(width * hidden, device=seeds.device)
    x = (seeds[:, None] + step * 0x9E3779B1) & word
    x = _mix(x ^ _mix((unit[None] * 0x85EBCA77 + 1) & word))
    factors = (x >= round(p * 2**32)).float() / (1 - p)
    return factors.view(len(seeds), width, hidden)


def _mix(x: Tensor) -> Tensor:
    word = 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & word
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & word
    return x ^ (x >> 16)
