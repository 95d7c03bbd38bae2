"""Label skew: each client holds a few shards of the data sorted by label."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples, collect
from fedprompt.data.partitions.registry import partition
from fedprompt.errors import InputError
from fedprompt.wording import counted


@partition(
    "shards",
    about="partition.shards_per_client shards each, of the data sorted by label",
    source="McMahan et al., AISTATS 2017",
)
def shards(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Sort by label, cut into equal shards, deal ``shards_per_client`` to each (McMahan et al., AISTATS 2017)."""
    wanted = clients * options.shards_per_client
    if wanted > len(samples):
        raise InputError(f"partition.shards_per_client: {options.shards_per_client} for each of"
                         f" {counted(clients, 'client')} are {wanted} shards, there are {len(samples)} training"
                         f" samples; allowed: at most {len(samples) // clients}")  # fmt: skip
    shuffled = rng.permutation(len(samples))
    by_label = shuffled[np.argsort(samples.labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, wanted)
    dealt = rng.permutation(wanted).reshape(clients, options.shards_per_client)
    return collect([[pieces[i] for i in mine] for mine in dealt])
