"""A data set as a federation sees it: every client's training samples, its local test data, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedprompt.data.dataset import Dataset, Split, View
from fedprompt.data.fingerprint import Fingerprint, fingerprint
from fedprompt.data.partitions.base import PartitionOptions
from fedprompt.data.partitions.division import divide
from fedprompt.data.partitions.long_tail import long_tail
from fedprompt.data.sampling import apportion, stratified
from fedprompt.errors import InputError
from fedprompt.seeding import Stream, generator
from fedprompt.texts import printable

LOCAL_TEST_SIZE = 200  # images in a client's local test set, as long as its classes hold enough of them
LOCAL_TEST_LEAST = 20  # below this a client's accuracy means little: caps on single classes are accepted to reach it


@dataclass(frozen=True, eq=False)
class FederatedData:
    """The federated view of a data set; none of its images is copied for it.

    ``public`` images are labelled and no client's own: class prototypes are made of them.
    ``clients`` are indices into ``train``, ``local_tests`` indices into ``test``, one int64 array per client.
    ``validation`` and ``test`` are each in one fixed random order, so that class-sorted files leak nothing.
    ``fingerprint`` is that of the whole data set, before any limit.
    """

    name: str
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    domain_classes: np.ndarray | None
    train: View
    validation: View
    public: View
    test: View
    clients: tuple[np.ndarray, ...]
    local_tests: tuple[np.ndarray, ...]
    fingerprint: Fingerprint
    notes: tuple[str, ...] = ()  # lines for the user about the data

    def client(self, i: int) -> Split:
        """Return a copy of client i's training samples."""
        return self.train.take(self.clients[i])

    @cached_property
    def sizes(self) -> np.ndarray:
        """Training samples per client, int64 [N]."""
        return np.array([len(indices) for indices in self.clients], dtype=np.int64)

    def class_counts(self) -> np.ndarray:
        """Training samples per client and class, int64 [N, classes]."""
        classes = len(self.class_names)
        return np.stack([np.bincount(self.train.labels[indices], minlength=classes) for indices in self.clients])


def federate(
    dataset: Dataset,
    *,
    clients: int,
    kind: str,
    options: PartitionOptions,
    validation: float,
    limit: int | None,
    imbalance_factor: float,
    seed: int,
    shots: int = 0,
) -> FederatedData:
    """Make the federated view: limit, hold out validation, publish, thin to a long tail, divide, draw local tests.

    The training set is first limited to ``limit`` images (stratified by class and domain), then the share
    ``validation`` of it is held out (stratified too), then ``shots`` images of every class are taken out and published
    (``head.shots``), then ``imbalance_factor > 1`` makes what is left long-tailed.
    Nothing of this, nor the order of validation and test, depends on the partition. Where domains differ in their
    classes (joined data sets), every client gets samples of one domain only. Raises InputError naming the key.
    """
    if not 0 <= validation < 1:
        raise InputError(f"data.validation: {validation} is not allowed; give a share from 0 to below 1")
    for part, split in (("training", dataset.train), ("test", dataset.test)):
        if not len(split):
            raise InputError(f"data.name: '{dataset.name}' has no {part} images; allowed: at least 1")
    train = _limited(dataset.train, limit, len(dataset.class_names), seed)
    held_out = stratified(
        _groups(train, len(dataset.class_names)),
        _validation_size(validation, len(train)),
        generator(seed, Stream.VALIDATION),
    )
    kept = np.setdiff1d(np.arange(len(train)), held_out)
    validation_view = View(train, generator(seed, Stream.TEST_ORDER, 1).permutation(held_out))
    published = _published(train.labels[kept], dataset.class_names, shots, seed)
    public = View(train, kept[published])
    kept = np.delete(kept, published)
    if imbalance_factor != 1:
        kept = kept[long_tail(train.labels[kept], imbalance_factor, generator(seed, Stream.DATA, 1))]
    train_view = View(train, kept)
    test = View(dataset.test, generator(seed, Stream.TEST_ORDER).permutation(len(dataset.test)))
    parts = divide(
        train_view,
        clients,
        kind,
        generator(seed, Stream.PARTITION),
        classes=len(dataset.class_names),
        options=options,
        per_domain=dataset.domain_classes is not None,
    )
    return FederatedData(
        name=dataset.name,
        class_names=dataset.class_names,
        domain_names=dataset.domain_names,
        domain_classes=dataset.domain_classes,
        train=train_view,
        validation=validation_view,
        public=public,
        test=test,
        clients=tuple(parts),
        local_tests=_local_tests(train_view, test, parts, len(dataset.class_names), seed),
        fingerprint=fingerprint(dataset),
        notes=dataset.notes,
    )


def _groups(split: Split | View, classes: int) -> np.ndarray:
    """Number the pairs of domain and class, int64 [n]."""
    return split.domains * classes + split.labels


def _limited(train: Split, limit: int | None, classes: int, seed: int) -> Split:
    """Keep a stratified subset of ``limit`` images, copied so that the others can be let go."""
    if limit is None:
        return train
    if not 1 <= limit <= len(train):
        raise InputError(f"data.limit: {limit} is not allowed; the training set has {len(train)} images, give 1 to"
                         f" {len(train)} or leave it out")  # fmt: skip
    return train.take(stratified(_groups(train, classes), limit, generator(seed, Stream.DATA)))


def _validation_size(share: float, images: int) -> int:
    """Return the number of images to hold out; InputError where that leaves none for validation or for training."""
    size = round(share * images)
    if share > 0 and images < 2:
        raise InputError(f"data.limit: {images} training image cannot be both trained on and held out for validation;"
                         " allowed: at least 2")  # fmt: skip
    if (share > 0 and size == 0) or size == images:
        kind, bound = ("validation", f"more than {0.5 / images:g}") if size == 0 else (
            "training", f"less than {1 - 0.5 / images:.10g}")  # fmt: skip
        raise InputError(f"data.validation: a share of {share:g} of {images} training images leaves none for {kind};"
                         f" allowed: {bound}")  # fmt: skip
    return size


def _published(labels: np.ndarray, class_names: tuple[str, ...], shots: int, seed: int) -> np.ndarray:
    """Indices of ``shots`` random images of every class, class by class; InputError where a class would be used up."""
    rng, chosen = generator(seed, Stream.PUBLIC), [np.empty(0, np.int64)]
    for label in range(len(class_names) if shots else 0):
        members = np.flatnonzero(labels == label)
        if shots >= len(members):
            raise InputError(_too_many_shots(shots, labels, class_names))
        chosen.append(rng.choice(members, shots, replace=False))
    return np.concatenate(chosen)


def _too_many_shots(shots: int, labels: np.ndarray, class_names: tuple[str, ...]) -> str:
    """Name the smallest class and what it allows: at least one image of it stays with the clients."""
    counts = np.bincount(labels, minlength=len(class_names))
    smallest = int(counts.argmin())
    most = int(counts[smallest]) - 1
    allowed = f"at most {most}, " if most > 0 else "more images of it (data.limit, data.validation), "
    return (
        f"head.shots: {shots}, and class '{printable(class_names[smallest])}' has {counts[smallest]} image(s) for "
        f"training, of which one must stay; allowed: {allowed}or prototypes from a file (head.embeddings)"
    )


def _local_tests(train: View, test: View, parts: list[np.ndarray], classes: int, seed: int) -> tuple[np.ndarray, ...]:
    """Draw each client's local test set with its own distribution over classes (and domains) in training."""
    groups = 1 + int(max(split.domains.max(initial=0) for split in (train, test)))
    train_groups, test_groups = _groups(train, classes), _groups(test, classes)
    members = [np.flatnonzero(test_groups == group) for group in range(groups * classes)]
    held = np.array([len(indices) for indices in members])
    drawn = []
    for client, part in enumerate(parts):
        counts = local_test_counts(np.bincount(train_groups[part], minlength=len(members)), held)
        rng = generator(seed, Stream.LOCAL_TEST, client=client)
        mine = [rng.choice(members[k], counts[k], replace=False) for k in np.flatnonzero(counts)]
        drawn.append(np.sort(np.concatenate([np.empty(0, np.int64), *mine])))
    return tuple(drawn)


def local_test_counts(own: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Return how many test samples of each class a client gets, int64 [K].

    ``own`` [K] are its training samples per class, ``held`` [K] what the test set holds. The total is the largest up
    to ``LOCAL_TEST_SIZE`` at which no class is asked for more than it holds, but at least ``LOCAL_TEST_LEAST``, where
    single classes are then capped. Classes that the test set lacks do not count.
    """
    weights = np.where(held > 0, own, 0) / max(own[held > 0].sum(), 1)
    if not weights.any():
        return np.zeros_like(held)
    fitting = int(np.min(held[weights > 0] / weights[weights > 0]))
    total = int(np.clip(fitting, LOCAL_TEST_LEAST, LOCAL_TEST_SIZE))
    return np.minimum(apportion(weights, total), held)
