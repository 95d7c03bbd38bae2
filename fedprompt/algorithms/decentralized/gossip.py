"""Averaging with neighbours: x_i ← Σ_j w_ij x_j, with whole messages or compressed ones.

Compressed messages follow CHOCO-gossip (Koloskova, Stich, Jaggi: Decentralized Stochastic Optimization and Gossip
Algorithms with Compressed Communication, ICML 2019, arXiv 1902.00340). Of every client there is a public copy x̂_i that
it and its neighbours hold; with a compression C and a step γ, in every gossip step

    q_i = C(x_i − x̂_i) to all neighbours,    x̂_i ← x̂_i + q_i,    x_i ← x_i + γ Σ_j w_ij (x̂_j − x̂_i)

What C loses stays in x_i − x̂_i and is sent later. W is symmetric, so the clients' mean is kept whatever C does; with C
the identity and γ = 1 this is x ← W x.

Models are {name: float64 [n, ...]}, a row per client; sums run over neighbours in ascending order, on one thread, so
that they come to the same bits everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

Models = dict[str, np.ndarray]


@dataclass(frozen=True)
class Compression:
    """What is sent of a tensor of n numbers.

    ``quantise``: every number as one of 2^bits − 1 even steps from −max|x| to max|x|, the nearest one: n·bits / 8 bytes
    and 4 for the maximum. ``topk``: the ``share`` of numbers that are largest in absolute value, in float32, each with
    its place: 8 bytes each.
    """

    kind: Literal["quantise", "topk"]
    bits: int = 8
    share: float = 0.1

    @property
    def gamma(self) -> float:
        """A step γ at which gossip converges in trials (20 clients; ring, exponential, full); larger ones may not."""
        if self.kind == "topk":
            return min(1.0, 2 * self.share)
        return 1.0 if self.bits >= 4 else 0.2

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """What arrives of ``values`` [n, d], a message per row."""
        return self._nearest(values) if self.kind == "quantise" else self._largest(values)

    def bytes(self, numbers: int) -> int:
        """Length of the message about a tensor of so many numbers."""
        if self.kind == "quantise":
            return math.ceil(numbers * self.bits / 8) + 4
        return 8 * self._kept(numbers)

    def _nearest(self, values: np.ndarray) -> np.ndarray:
        steps = 2 ** (self.bits - 1) - 1
        largest = np.abs(values).max(axis=1, keepdims=True)
        size = (largest / steps).astype(np.float32).astype(np.float64)  # as it is sent
        whole = np.rint(np.divide(values, size, out=np.zeros_like(values), where=size > 0))
        return np.clip(whole, -steps, steps) * size

    def _largest(self, values: np.ndarray) -> np.ndarray:
        kept = self._kept(values.shape[1])
        places = np.argpartition(-np.abs(values), kept - 1, axis=1)[:, :kept]
        sent = np.zeros_like(values)
        np.put_along_axis(sent, places, np.take_along_axis(values, places, axis=1).astype(np.float32), axis=1)
        return sent

    def _kept(self, numbers: int) -> int:
        return max(1, round(self.share * numbers))


def mix(weights: csr_array, models: Models) -> Models:
    """x ← W x, for every tensor [n, ...]."""
    return {name: (weights @ x.reshape(len(x), -1)).reshape(x.shape) for name, x in models.items()}


def mix_compressed(
    weights: csr_array, models: Models, public: Models, compression: Compression, gamma: float
) -> tuple[Models, Models]:
    """One step of CHOCO-gossip: the next x and x̂. Who has no neighbour sends nothing, and its x̂ stays as it is."""
    sends = (np.diff(weights.indptr) > 1)[:, None]  # a row holds its diagonal, and a weight per neighbour
    next_models, next_public = {}, {}
    for name, x in models.items():
        rows, copies = x.reshape(len(x), -1), public[name].reshape(len(x), -1)
        copies = copies + np.where(sends, compression(rows - copies), 0)
        moved = rows + gamma * (weights @ copies - copies)
        next_models[name], next_public[name] = moved.reshape(x.shape), copies.reshape(x.shape)
    return next_models, next_public
