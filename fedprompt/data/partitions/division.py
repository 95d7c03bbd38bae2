"""How a training set is divided over clients, by the partition that a configuration names."""

from __future__ import annotations

import numpy as np

from fedprompt.data.dataset import Split, View
from fedprompt.data.partitions.base import PartitionOptions, Samples, divide_all, within_domains
from fedprompt.data.partitions.registry import PARTITIONS
from fedprompt.errors import InputError


def divide(
    split: Split | View,
    clients: int,
    kind: str,
    rng: np.random.Generator,
    *,
    classes: int,
    options: PartitionOptions,
    per_domain: bool = False,
) -> list[np.ndarray]:
    """Divide ``split`` over ``clients``: one sorted int64 index array per client, disjoint, covering every sample.

    With ``per_domain`` every client belongs to one domain: domains get clients in proportion to their sizes, at least
    one, and ``kind`` is applied within each. Raises InputError for values that are not allowed or cannot be met.
    """
    function = PARTITIONS.get(kind).thing
    options.check()
    if clients < 1:
        raise InputError(f"federation.clients: {clients} is not allowed; give a whole number of at least 1")
    if len(split) and split.labels.max() >= classes:
        raise ValueError(f"label {split.labels.max()} in a data set of {classes} classes")
    samples = Samples(split.labels, split.domains)
    apply = within_domains if per_domain else divide_all
    return [np.sort(indices) for indices in apply(function, samples, clients, options, rng)]
