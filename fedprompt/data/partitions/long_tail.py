"""Long-tailed training sets: classes of geometrically falling sizes."""

from __future__ import annotations

import math

import numpy as np

from fedprompt.errors import InputError


def long_tail(labels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Return the indices (sorted int64) of a long-tailed subset: ``n_max * factor ** (-c / (classes - 1))`` of class c.

    n_max is the largest class's size; a class that holds less keeps all it has, and every class keeps at least one
    sample (Cui et al., CVPR 2019). Classes are counted in the order of their labels.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise InputError(f"partition.imbalance_factor: {factor} is not allowed; give a finite number of at least 1")
    present, counts = np.unique(labels, return_counts=True)
    kept = []
    for position, label in enumerate(present):
        size = round(counts.max() * factor ** (-position / max(len(present) - 1, 1)))
        kept.append(rng.permutation(np.flatnonzero(labels == label))[: max(size, 1)])
    return np.sort(np.concatenate(kept))
