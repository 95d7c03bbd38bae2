"""Where training and prediction happen. One interface, two pools: this process, or Ray's workers (``ray_pool.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np

from fedprompt.client.cohort import Task, Update
from fedprompt.client.evaluate import Predictions
from fedprompt.client.examples import Examples
from fedprompt.config import Config
from fedprompt.data import FederatedData, Split
from fedprompt.models.params import Params
from fedprompt.runtime.worker import Facts, Worker

SplitName = Literal["validation", "test"]
SHARD_BATCHES = 16  # batches per shard of a test set: shards end where batches end, so sharding changes no prediction


class Pool(Protocol):
    """What the federation loop asks of whoever does the work."""

    facts: Facts

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train groups of clients; a group's updates come as soon as it is done."""

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict a whole split in its fixed order and batches."""

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict with each client's own params the samples ``indices`` of a split."""

    def close(self) -> None:
        """Let go of workers and data."""


def raw_examples(split: Split) -> Examples:
    """Examples of which nothing has been computed yet."""
    return Examples(labels=split.labels, domains=split.domains, images=split.images)


def shards(split: Split, batch_size: int) -> list[Examples]:
    """Cut a split into consecutive shards that end where batches end."""
    size = SHARD_BATCHES * batch_size
    return [
        raw_examples(Split(split.images[i : i + size], split.labels[i : i + size], split.domains[i : i + size]))
        for i in range(0, len(split), size)
    ]


def fits_cache(config: Config, data: FederatedData, facts: Facts) -> bool:
    """Whether the tokens before block ``prompt.layer`` of all images fit ``runtime.cache_mb``: all or none are kept."""
    images = len(data.train) + len(data.validation) + len(data.test)
    return 0 < facts.token_bytes * images <= config.runtime.cache_mb * 2**20


class InProcessPool:
    """One worker, in this process, without Ray."""

    def __init__(self, config: Config, data: FederatedData) -> None:
        self._worker = Worker(config, len(data.class_names), data.domain_classes)
        self.facts = self._worker.facts()
        self._data, self._keep_tokens = data, fits_cache(config, data, self.facts)
        batch_size = config.local.batch_size
        self._raw_shards = {"validation": shards(data.validation, batch_size), "test": shards(data.test, batch_size)}
        self._clients: dict[int, Examples] = {}
        self._shards: dict[str, list[Examples]] = {}

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train one group after the other."""
        for tasks in groups:
            yield self._worker.train(round, tasks, *(self._client(task.client) for task in tasks))

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict shard by shard."""
        return Predictions.concatenate([self._worker.predict(params, shard) for shard in self._split(split)])

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict client by client."""
        parts = self._split(split)
        return {c: self._worker.predict_client(params, indices[c], *parts) for c, params in models.items()}

    def close(self) -> None:
        """Forget prepared features."""
        self._clients.clear()
        self._shards.clear()

    def _client(self, client: int) -> Examples:
        if client not in self._clients:
            examples = raw_examples(self._data.client(client))
            self._clients[client] = self._worker.prepare(examples, self._keep_tokens)
        return self._clients[client]

    def _split(self, split: SplitName) -> list[Examples]:
        if split not in self._shards:
            self._shards[split] = [self._worker.prepare(raw, self._keep_tokens) for raw in self._raw_shards[split]]
        return self._shards[split]
