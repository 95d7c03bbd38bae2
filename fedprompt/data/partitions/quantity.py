"""Quantity skew: clients differ in their sizes."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples, cut, with_minimum
from fedprompt.data.partitions.registry import partition


@partition(
    "quantity",
    about="clients' sizes drawn from Dirichlet(partition.alpha), labels alike",
    source="Li et al., ICDE 2022",
)
def quantity(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the clients' sizes from Dirichlet(alpha); labels stay iid (Li et al., ICDE 2022)."""

    def draw() -> list[np.ndarray]:
        return cut(rng.permutation(len(samples)), rng.dirichlet(np.full(clients, options.alpha)))

    return with_minimum(draw, samples, clients, options, rng)
