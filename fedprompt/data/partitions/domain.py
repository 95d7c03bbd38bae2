"""Feature skew: each client holds samples of one domain."""

from __future__ import annotations

import numpy as np

from fedprompt.data.partitions.base import PartitionOptions, Samples, within_domains
from fedprompt.data.partitions.dirichlet import dirichlet
from fedprompt.data.partitions.registry import partition


@partition("domain", about="one domain per client, and within it label skew as by dirichlet")
def domain(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Give every client one domain; within a domain, labels are divided as by ``dirichlet``."""
    return within_domains(dirichlet, samples, clients, options, rng)
