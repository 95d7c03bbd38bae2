"""Choosing samples in given proportions: shared by the data sets, the validation split and the local test sets."""

from __future__ import annotations

import numpy as np


def apportion(weights: np.ndarray, total: int) -> np.ndarray:
    """Divide ``total`` in proportion to ``weights`` [k] into whole numbers int64 [k] by the largest remainder.

    Equal remainders go to the lower index first, so the result does not depend on anything but the arguments.
    """
    weights = np.asarray(weights, dtype=np.float64)
    exact = weights / weights.sum() * total
    whole = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-np.round(exact - whole, 9), kind="stable")
    whole[order[: total - whole.sum()]] += 1
    return whole


def stratified(groups: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``size`` indices (sorted int64) into ``groups`` [n]: every group keeps its share, members are random."""
    _, members, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = rng.permutation(len(groups))
    by_group = np.split(shuffled[np.argsort(members[shuffled], kind="stable")], np.cumsum(counts)[:-1])
    quotas = apportion(counts, size) if size else np.zeros_like(counts)
    return np.sort(np.concatenate([indices[:quota] for indices, quota in zip(by_group, quotas)]))
