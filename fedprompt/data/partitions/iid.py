"""Independent and identically distributed clients."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples
from fedprompt.data.partitions.registry import partition


@partition("iid", about="equal parts of the shuffled data")
def iid(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle and cut into equal parts."""
    return np.array_split(rng.permutation(len(samples)), clients)
