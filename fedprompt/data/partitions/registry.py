"""Names of partitions: ``partition.kind``."""

from __future__ import annotations

from collections.abc import Callable

from fedprompt.data.partitions.base import Partition
from fedprompt.registry import Registered, Registry

PARTITIONS: Registry[Registered[Partition]] = Registry(
    "partitions", noun="partition", key="partition.kind", package="fedprompt.data.partitions"
)


def partition(name: str, about: str, source: str = "") -> Callable[[Partition], Partition]:
    """Register a function ``(samples, clients, options, rng) -> indices per client`` as ``partition.kind=name``.

    ``about`` is a line about it, ``source`` the paper. The arrays hold every sample once, all together; a client may
    have none: it gets one of the largest client's. Raises InputError where another function has the name.
    """

    def register(function: Partition) -> Partition:
        PARTITIONS.add(Registered(name, about, source, function))
        return function

    return register
