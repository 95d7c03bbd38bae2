"""Label skew: each class is divided by a Dirichlet draw."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples, collect, cut, with_minimum
from fedprompt.data.partitions.registry import partition


@partition(
    "dirichlet",
    about="each class divided by a draw from Dirichlet(partition.alpha)",
    source="Yurochkin et al., ICML 2019",
)
def dirichlet(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide each class over the clients by a draw from Dirichlet(alpha) (Yurochkin et al., ICML 2019)."""

    def draw() -> list[np.ndarray]:
        pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(samples.labels):
            members = rng.permutation(np.flatnonzero(samples.labels == label))
            for mine, piece in zip(pieces, cut(members, rng.dirichlet(np.full(clients, options.alpha)))):
                mine.append(piece)
        return collect(pieces)

    return with_minimum(draw, samples, clients, options, rng)
