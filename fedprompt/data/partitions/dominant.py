"""Label skew: one class dominates each client."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples, collect, cut
from fedprompt.data.partitions.registry import partition


@partition("dominant", about="one class dominates each client, with partition.dominant_share of its samples")
def dominant(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Let one class dominate each client: client i belongs to class i modulo the classes that there are.

    ``dominant_share`` of every class is divided evenly among its clients, the rest by Dirichlet(1) over the others. A
    class without a client of its own (fewer clients than classes) goes to all by Dirichlet(1).
    """
    labels = np.unique(samples.labels)
    owner = np.arange(clients) % len(labels)
    pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for position, label in enumerate(labels):
        members = rng.permutation(np.flatnonzero(samples.labels == label))
        own, others = np.flatnonzero(owner == position), np.flatnonzero(owner != position)
        share = 0.0 if len(own) == 0 else 1.0 if len(others) == 0 else options.dominant_share
        first, rest = np.split(members, [round(share * len(members))])
        groups = [*zip(own, np.array_split(first, max(len(own), 1)))]
        if len(others):
            groups += [*zip(others, cut(rest, rng.dirichlet(np.ones(len(others)))))]
        for client, piece in groups:
            pieces[client].append(piece)
    return collect(pieces)
