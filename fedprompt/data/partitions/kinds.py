"""How a training set is divided over clients. Every kind is one function; a new one registers with ``@kind(name)``.

A kind returns one index array per client; together they hold every sample once. ``partition`` checks the arguments,
fills clients that a kind left empty (by ``give_from_largest``) and sorts the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedprompt.data.dataset import Split, View
from fedprompt.data.sampling import apportion
from fedprompt.errors import InputError, did_you_mean
from fedprompt.wording import counted

REDRAWS = 20  # a Dirichlet draw that leaves a client below the minimum is repeated at most so many times
REPAIRS = ("move", "refuse")


@dataclass(frozen=True)
class PartitionOptions:
    """The settings of all kinds; each kind reads its own.

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
    """What a kind may look at: labels int64 [n] and domains int64 [n]."""

    labels: np.ndarray
    domains: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


Kind = Callable[[Samples, int, PartitionOptions, np.random.Generator], list[np.ndarray]]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register a function ``(samples, clients, options, rng) -> indices per client`` as ``partition.kind=name``."""

    def register(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return register


def partition(
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
    if kind not in KINDS:
        raise InputError(f"partition.kind: unknown '{kind}'{did_you_mean(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    options.check()
    if clients < 1:
        raise InputError(f"federation.clients: {clients} is not allowed; give a whole number of at least 1")
    if len(split) and split.labels.max() >= classes:
        raise ValueError(f"label {split.labels.max()} in a data set of {classes} classes")
    samples = Samples(split.labels, split.domains)
    divide = _within_domains if per_domain else _divide
    return [np.sort(indices) for indices in divide(KINDS[kind], samples, clients, options, rng)]


def _divide(
    function: Kind, samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator
) -> list[np.ndarray]:
    """Apply one kind and see that no client is empty."""
    if clients > len(samples):
        raise InputError(f"federation.clients: {clients} is more clients than there are training samples to divide,"
                         f" {len(samples)}; give at most that many")  # fmt: skip
    return give_from_largest(function(samples, clients, options, rng), 1, rng)


def _within_domains(
    function: Kind, samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator
) -> list[np.ndarray]:
    """Apply one kind within each domain, the clients of the first domain first."""
    domains, sizes = np.unique(samples.domains, return_counts=True)
    if clients < len(domains):
        raise InputError(f"federation.clients: {clients} is too few for {len(domains)} domains, of which every one"
                         f" needs a client; give at least {len(domains)}")  # fmt: skip
    shares = 1 + apportion(np.maximum(sizes / sizes.sum() * clients - 1, 1e-12), clients - len(domains))
    parts = []
    for domain, share in zip(domains, shares):
        members = np.flatnonzero(samples.domains == domain)
        inside = Samples(samples.labels[members], samples.domains[members])
        parts += [members[indices] for indices in _divide(function, inside, int(share), options, rng)]
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


def _with_minimum(
    draw: Callable[[], list[np.ndarray]], samples: Samples, clients: int, options: PartitionOptions, rng
) -> list[np.ndarray]:
    """Draw until every client has ``min_size`` samples; after ``REDRAWS`` draws repair the best one, or refuse."""
    if options.min_size * clients > len(samples):
        raise InputError(f"partition.min_size: {options.min_size} for each of {counted(clients, 'client')} needs"
                         f" {options.min_size * clients} training samples, there are {len(samples)};"
                         f" allowed: at most {len(samples) // clients}")  # fmt: skip
    best, reached = None, -1
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


def _cut(indices: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Cut ``indices`` [n] into consecutive parts of the given shares [k] (sum 1)."""
    cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
    return np.split(indices, cuts)


def _collect(pieces: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Join each client's pieces; a client without any gets an empty array."""
    return [np.concatenate([np.empty(0, np.int64), *mine]) for mine in pieces]


@kind("iid")
def iid(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Shuffle and cut into equal parts."""
    return np.array_split(rng.permutation(len(samples)), clients)


@kind("dirichlet")
def dirichlet(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Divide each class over the clients by a draw from Dirichlet(alpha) (Yurochkin et al., ICML 2019)."""

    def draw() -> list[np.ndarray]:
        pieces: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for label in np.unique(samples.labels):
            members = rng.permutation(np.flatnonzero(samples.labels == label))
            for mine, piece in zip(pieces, _cut(members, rng.dirichlet(np.full(clients, options.alpha)))):
                mine.append(piece)
        return _collect(pieces)

    return _with_minimum(draw, samples, clients, options, rng)


@kind("dominant")
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
            groups += [*zip(others, _cut(rest, rng.dirichlet(np.ones(len(others)))))]
        for client, piece in groups:
            pieces[client].append(piece)
    return _collect(pieces)


@kind("shards")
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
    return _collect([[pieces[i] for i in mine] for mine in dealt])


@kind("quantity")
def quantity(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the clients' sizes from Dirichlet(alpha); labels stay iid (Li et al., ICDE 2022)."""

    def draw() -> list[np.ndarray]:
        return _cut(rng.permutation(len(samples)), rng.dirichlet(np.full(clients, options.alpha)))

    return _with_minimum(draw, samples, clients, options, rng)


@kind("domain")
def domain(samples: Samples, clients: int, options: PartitionOptions, rng: np.random.Generator) -> list[np.ndarray]:
    """Give every client one domain; within a domain, labels are divided as by ``dirichlet``."""
    return _within_domains(dirichlet, samples, clients, options, rng)


def long_tail(labels: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """Return the indices (sorted int64) of a long-tailed subset: ``n_max * factor ** (-c / (classes - 1))`` of class c.

    n_max is the largest class's size; a class that holds less keeps all it has, and every class keeps at least one
    sample (Cui et al., CVPR 2019). Classes are counted in the order of their labels.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise InputError(f"partition.imbalance_factor: {factor} is not allowed; give a finite number of at least 1")
    present, counts = np.unique(labels, return_counts=True)
    kept = []
    for position, label in enumerate(present):
        size = round(counts.max() * factor ** (-position / max(len(present) - 1, 1)))
        kept.append(rng.permutation(np.flatnonzero(labels == label))[: max(size, 1)])
    return np.sort(np.concatenate(kept))
