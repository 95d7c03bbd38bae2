"""What partitions share: their settings, what they see of the data, and steps that several of them take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprompt.data.sampling import apportion
from fedprompt.errors import InputError, did_you_mean
from fedprompt.wording import counted

REDRAWS = 20  # a Dirichlet draw that leaves a client below the minimum is repeated at most so many times
REPAIRS = ("move", "refuse")


@dataclass(frozen=True)
class PartitionOptions:
    """The settings of all partitions; each reads its own.

    alpha: concentration of the Dirichlet draws (dirichlet, quantity, domain). min_size: least samples of a client and
    repair: what to do when no draw reaches it, ``move`` single samples or ``refuse`` (the same three kinds).
    dominant_share: share of a class that its dominated clients get (dominant). shards_per_client: (shards).
    """

    alpha: float = 0.1
    min_size: int = 10
    repair: str = "move"
    dominant_share: float = 0.99
    shards_per_client: int = 2

    def check(self) -> None:
        """Raise InputError, naming the key, for a value outside its range."""
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"partition.alpha: {self.alpha} is not allowed; give a finite number above 0")
        if self.min_size < 1:
            raise InputError(f"partition.min_size: {self.min_size} is not allowed; give a whole number of at least 1")
        if self.repair not in REPAIRS:
            hint = did_you_mean(self.repair, REPAIRS)
            raise InputError(f"partition.repair: unknown '{self.repair}'{hint}; allowed: {', '.join(REPAIRS)}")
        if not 0 < self.dominant_share <= 1:
            raise InputError(f"partition.dominant_share: {self.dominant_share} is not allowed; give a share in (0, 1]")
        if self.shards_per_client < 1:
            raise InputError(f"partition.shards_per_client: {self.shards_per_client} is not allowed; at least 1")


@dataclass(frozen=True, eq=False)
class Samples:
    """What a partition may look at: labels int64 [n] and domains int64 [n]."""

    labels: np.ndarray
    domains: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


# (samples, clients, options, rng) -> one index array per client; together they hold every sample once
Partition = Callable[[Samples, int, PartitionOptions, np.random.Generator], list[np.ndarray]]


def divide_all(
    function: Partition, samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator
) -> list[np.ndarray]:
    """Apply a partition and see that no client is empty."""
    if clients > len(samples):
        raise InputError(f"federation.clients: {clients} is more clients than there are training samples to divide,"
                         f" {len(samples)}; give at most that many")  # fmt: skip
    return give_from_largest(_complete(function(samples, clients, options, rng), len(samples), clients), 1, rng)


def _complete(parts: Any, samples: int, clients: int) -> list[np.ndarray]:
    """Return the parts; InputError unless there is one per client and they hold every sample once."""
    parts = [np.asarray(part, dtype=np.int64) for part in parts]
    together = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    if len(parts) != clients or not np.array_equal(together, np.arange(samples)):
        raise InputError(
            f"partition.kind: its function gave {len(parts)} parts of {len(together)} samples in all; allowed: "
            f"{clients} parts that hold each of {samples} samples once"
        )
    return parts


def within_domains(
    function: Partition, samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator
) -> list[np.ndarray]:
    """Apply a partition within each domain, the clients of the first domain first."""
    domains, sizes = np.unique(samples.domains, return_counts=True)
    if clients < len(domains):
        raise InputError(f"federation.clients: {clients} is too few for {len(domains)} domains, of which every one"
                         f" needs a client; give at least {len(domains)}")  # fmt: skip
    shares = 1 + apportion(np.maximum(sizes / sizes.sum() * clients - 1, 1e-12), clients - len(domains))
    parts = []
    for domain, share in zip(domains, shares):
        members = np.flatnonzero(samples.domains == domain)
        inside = Samples(samples.labels[members], samples.domains[members])
        parts += [members[indices] for indices in divide_all(function, inside, int(share), options, rng)]
    return parts


def give_from_largest(parts: list[np.ndarray], minimum: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Bring every client to ``minimum`` samples: rule "largest gives".

    While a client has too few, the smallest client receives one sample, drawn uniformly from the largest client's
    (ties: the lower index). The caller makes sure that there are enough samples.
    """
    sizes = np.array([len(part) for part in parts])
    if sizes.min() >= minimum:
        return parts
    held = [list(part) for part in parts]
    while sizes.min() < minimum:
        receiver, giver = int(sizes.argmin()), int(sizes.argmax())
        held[receiver].append(held[giver].pop(int(rng.integers(sizes[giver]))))
        sizes[receiver] += 1
        sizes[giver] -= 1
    return [np.array(part, dtype=np.int64) for part in held]


def with_minimum(
    draw: Callable[[], list[np.ndarray]],
    samples: Samples,
    clients: int,
    options: PartitionOptions,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Draw until every client has ``min_size`` samples; after ``REDRAWS`` draws repair the best one, or refuse."""
    if options.min_size * clients > len(samples):
        raise InputError(f"partition.min_size: {options.min_size} for each of {counted(clients, 'client')} needs"
                         f" {options.min_size * clients} training samples, there are {len(samples)};"
                         f" allowed: at most {len(samples) // clients}")  # fmt: skip
    best: list[np.ndarray] = []
    reached = -1
    for _ in range(REDRAWS):
        parts = draw()
        smallest = min(len(part) for part in parts)
        if smallest > reached:
            best, reached = parts, smallest
        if reached >= options.min_size:
            return best
    if options.repair == "refuse":
        raise InputError(f"partition.min_size: no draw of {REDRAWS} gave each of {counted(clients, 'client')}"
                         f" {options.min_size} samples, the best minimum was {reached}; lower it,"
                         " raise partition.alpha, or set partition.repair=move")  # fmt: skip
    return give_from_largest(best, options.min_size, rng)


def cut(indices: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Cut ``indices`` [n] into consecutive parts of the given shares [k] (sum 1)."""
    cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, cuts)


def collect(pieces: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Join each client's pieces; a client without any gets an empty array."""
    return [np.concatenate([np.empty(0, np.int64), *mine]) for mine in pieces]
