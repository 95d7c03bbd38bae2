"""The pool of Ray workers: client data in the object store, one frozen backbone and a share of a GPU per worker.

The samples of a client are one object, put when it first takes part and read by workers as zero-copy views. Prepared
features are objects too: made once, by one worker, and read by all. A worker that dies is started anew by Ray and its
call repeated; as a call's result depends on its arguments alone, nothing but time is lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.util import ActorPool
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedprompt.client.cohort import Task, Update
from fedprompt.client.evaluate import Predictions
from fedprompt.config import Config
from fedprompt.data import FederatedData
from fedprompt.models.params import Params
from fedprompt.runtime.places import shares
from fedprompt.runtime.pool import SplitName, fits_cache, raw_examples, shards, threads_per_worker
from fedprompt.runtime.worker import Worker

RESTARTS = 3  # times that Ray restarts a worker, and repeats one call, before the run fails

ClientWorker = ray.remote(Worker)


class RayPool:
    """Workers on a Ray cluster that is already connected, at ``places`` that are theirs."""

    def __init__(self, config: Config, data: FederatedData, places: PlacementGroup) -> None:
        there = PlacementGroupSchedulingStrategy(places)
        options = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS, "scheduling_strategy": there}
        arguments = (config, len(data.class_names), data.domain_classes, threads_per_worker(config))
        self.workers = [
            ClientWorker.options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0), **options).remote(*arguments)
            for share in shares(config)
        ]
        batch_size = config.local.batch_size
        self._shards = {
            split: [ray.put(shard) for shard in shards(getattr(data, split), batch_size)]
            for split in ("validation", "test")
        }
        self._pool = ActorPool(self.workers)
        self._data = data
        self._raw_clients: dict[int, ray.ObjectRef] = {}  # kept: with them Ray makes lost prepared ones again
        self._prepared_clients: dict[int, ray.ObjectRef] = {}
        self._prepared_shards: dict[str, list[ray.ObjectRef]] = {}
        self.facts = ray.get(self.workers[0].facts.remote())
        self._keep_tokens = fits_cache(config, data, self.facts)

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train the groups on whichever workers are free, those with the most work first."""
        self._prepare(task.client for tasks in groups for task in tasks)

        def submit(worker: Any, tasks: Sequence[Task]) -> ray.ObjectRef:
            examples = [self._prepared_clients[task.client] for task in tasks]
            return worker.train.remote(round, tasks, *examples)

        return self._pool.map_unordered(submit, list(groups))

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict the shards of a split on all workers."""
        sent = ray.put(params)
        parts = self._pool.map(lambda worker, shard: worker.predict.remote(sent, shard), self._split(split))
        return Predictions.concatenate(list(parts))

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict for one client after the other, on all workers."""
        parts = self._split(split)

        def submit(worker: Any, client: int) -> ray.ObjectRef:
            return worker.predict_client.remote(models[client], indices[client], *parts)

        return dict(zip(models, self._pool.map(submit, list(models)), strict=True))

    def close(self) -> None:
        """End the workers; what they and this pool put into the object store goes with the references."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers.clear()

    def _prepare(self, clients: Iterable[int]) -> None:
        """Put the samples of clients that take part for the first time, and have their features computed."""
        new = {c: ray.put(raw_examples(self._data.client(c))) for c in clients if c not in self._prepared_clients}
        self._raw_clients.update(new)
        self._prepared_clients.update(zip(new, self._prepared(list(new.values())), strict=True))

    def _split(self, split: SplitName) -> list[ray.ObjectRef]:
        if split not in self._prepared_shards:
            self._prepared_shards[split] = self._prepared(self._shards[split])
        return self._prepared_shards[split]

    def _prepared(self, raw: Sequence[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """References to prepared examples, asked of the workers in turn; nothing of them passes through the driver."""
        asked = zip(raw, itertools.cycle(self.workers), strict=False)
        return [worker.prepare.remote(examples, self._keep_tokens) for examples, worker in asked]
