"""What a head is, for many clients at once: stacked weights, batched products; and the parts of trained ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedprompt.models.batch import Batch
from fedprompt.models.params import HEAD, Params


@dataclass(frozen=True)
class HeadOptions:
    """Which classifier (configuration section ``head``)."""

    kind: str = "mlp"
    hidden: int = 512
    dropout: float = 0.5
    input: str = "features"
    scale: float = 50.0  # of the cosines with class prototypes


class Head:
    """Class scores out of features. A subclass registers with ``@head(name, about)``.

    ``prototypes`` [K, D], one row per class, are given to a head that wants them.
    """

    is_trained: ClassVar[bool] = True  # whether it has params
    wants_prototypes: ClassVar[bool] = False  # from head.embeddings, else means of head.shots public samples per class

    def __init__(self, options: HeadOptions, prototypes: Tensor | None = None) -> None:
        self.options, self.prototypes = options, prototypes

    @property
    def dropped(self) -> int:
        """Units per sample whose dropout factors, at the rate ``head.dropout``, a training step draws."""
        return 0

    def init(self, inputs: int, classes: int, rng: np.random.Generator) -> Params:
        """Draw the params at their start; their names begin with ``head.``."""
        return {}

    def scores(self, params: Params, features: Tensor, batch: Batch) -> Tensor:
        """Class scores [M, K] of features [M, D], with stacked params {name: [G, ...]}.

        ``batch.padded`` puts samples side by side by client [G, B, D], ``batch.unpadded`` takes that back;
        ``batch.keep`` [G, B, dropped] are the dropout factors of a training step, else None.
        """
        raise NotImplementedError


def init_layers(sizes: Sequence[int], rng: np.random.Generator) -> Params:
    """Draw linear layers as torch's Linear starts: weights [out, in] and biases [out] uniform in ±1/sqrt(in)."""
    params = {}
    for number, (before, after) in enumerate(pairwise(sizes), start=1):
        bound = 1 / math.sqrt(before)
        params[f"{HEAD}{number}.weight"] = _uniform(rng, bound, (after, before))
        params[f"{HEAD}{number}.bias"] = _uniform(rng, bound, (after,))
    return params


def layer(params: Params, number: int, x: Tensor) -> Tensor:
    """Apply each client's own layer of that number to x [G, B, in]."""
    weight, bias = params[f"{HEAD}{number}.weight"], params[f"{HEAD}{number}.bias"]
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
