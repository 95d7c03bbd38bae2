"""Where training and prediction happen. One interface, two pools: this process, or Ray's workers (``ray_pool.py``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, Protocol

import numpy as np
import torch

from fedprompt.blackbox.service import Ledger, LocalService, Service
from fedprompt.client.evaluate import Predictions
from fedprompt.client.examples import Examples
from fedprompt.client.personal import Point, Tuning
from fedprompt.client.tasks import Task, Update
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData, Split, View
from fedprompt.data.inputs import Inputs
from fedprompt.models.params import Params
from fedprompt.runtime.build import build_remote, build_scorer, worker_parts
from fedprompt.runtime.features import FeatureMemory
from fedprompt.runtime.memory import check_memory
from fedprompt.runtime.worker import Facts, Worker

SplitName = Literal["validation", "test"]
Key = tuple[str, int]  # "train" or "local" (its test data) and a client, or a split and a shard
SHARD_BATCHES = 16  # batches per shard of a test set: shards end where batches end, so sharding changes no prediction


class Pool(Protocol):
    """What the federation loop asks of whoever does the work."""

    facts: Facts
    notes: list[str]  # what the user should know before the first round

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train groups of clients; a group's updates come as soon as it is done."""

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict a whole split in its fixed order and batches."""

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict with each client's own params the samples ``indices`` of a split."""

    def personalize(
        self, tuning: Tuning, round: int, groups: Sequence[Sequence[Task]], robust: np.ndarray
    ) -> Iterator[list[Point]]:
        """Let groups of clients go on tuning for themselves; a group's scores come as soon as it is done.

        Robustness is measured on the samples ``robust`` of the test set.
        """

    def queries(self) -> dict[int, int]:
        """Queries that a black-box model has answered, by client; empty where there is none."""

    def resume(self, queries: Mapping[int, int]) -> None:
        """Let a black-box model go on from the queries of an earlier part of the run."""

    def close(self) -> None:
        """Let go of workers and data."""


@dataclass(frozen=True)
class Part:
    """A client's samples, or a shard of a test set: the samples ``indices`` of ``view``."""

    view: View
    indices: np.ndarray

    def unprepared(self) -> Examples:
        """Labels and domains, all that prepared examples hold where nothing can be computed beforehand."""
        return Examples(labels=self.view.labels[self.indices], domains=self.view.domains[self.indices], inputs=None)

    def inputs(self) -> Inputs:
        """The inputs, none of them copied."""
        return self.view.inputs(self.indices)


def client_part(data: FederatedData, client: int) -> Part:
    """A client's training samples."""
    return Part(data.train, data.clients[client])


def personal_parts(data: FederatedData, tasks: Sequence[Task], robust: np.ndarray) -> dict[Key, Part]:
    """What a group needs that goes on tuning: training sets, local tests, and samples of the test set for all."""
    clients = [task.client for task in tasks]
    train = {("train", client): client_part(data, client) for client in clients}
    tests = {("local", client): Part(data.test, data.local_tests[client]) for client in clients}
    return {**train, **tests, ("robust", 0): Part(data.test, robust)}


def shards(view: View, batch_size: int) -> list[Part]:
    """Cut a split into consecutive shards that end where batches end."""
    size = SHARD_BATCHES * batch_size
    return [Part(view, np.arange(i, min(i + size, len(view)))) for i in range(0, len(view), size)]


@dataclass(frozen=True)
class Needs:
    """What is computed of the inputs once and kept, and whether they are needed in every step all the same."""

    tokens: bool  # before block `prompt.layer`, of all samples or none
    anything: bool  # tokens or queries
    inputs: bool


def needs_of(config: Config, data: FederatedData, facts: Facts) -> tuple[Needs, list[str]]:
    """What a run needs of its inputs, and a line for the user where ``runtime.cache_mb`` has no room for the tokens."""
    samples = len(data.train) + len(data.validation) + len(data.test)
    wanted, room = facts.token_bytes * samples, config.runtime.cache_mb
    tokens = 0 < wanted <= room * 2**20
    needs = Needs(tokens, tokens or facts.needs_query, facts.needs_inputs and not tokens)
    if tokens or not wanted:
        return needs, []
    return needs, [
        f"tokens before block {config.prompt.layer} of all images take {wanted / 2**20:,.0f} MB, more than "
        f"runtime.cache_mb = {room:g}: they are computed again in every step"
    ]


def needs_public(config: Config) -> bool:
    """Whether workers need the public samples: not where there are none, or a service makes prototypes of them."""
    return config.public_shots > 0 and not config.is_blackbox


def service_here(config: Config, data: FederatedData) -> Service:
    """The black box in this process, or the one at ``blackbox.address``."""
    if config.blackbox.address is not None:
        return build_remote(config, len(data.class_names))
    scorer = build_scorer(config, len(data.class_names), public_split(data))
    return LocalService(scorer, Ledger(config.blackbox.budget))


def public_split(data: FederatedData) -> Split:
    """Copies of the public samples."""
    return data.public.take(np.arange(len(data.public)))


def threads_per_worker(config: Config) -> int:
    """Threads that one worker's matrix products use: the whole cores of its share."""
    return max(1, int(config.runtime.cpus_per_worker))


class InProcessPool:
    """One worker, in this process, without Ray; several groups train side by side on threads that share it.

    A group computes on ``runtime.cpus_per_worker`` cores, as on Ray, so that both give the same numbers whatever the
    machine: matrix products add up in another order on another number of threads.

    ``memory``: features that earlier runs in this process have computed.
    """

    def __init__(self, config: Config, data: FederatedData, memory: FeatureMemory | None = None) -> None:
        check_memory(config, data)
        threads = threads_per_worker(config)
        torch.set_num_threads(threads)  # for the prototypes, too, as on Ray
        self._service = service_here(config, data) if config.is_blackbox else None
        public = public_split(data) if needs_public(config) else None
        self._worker = Worker(worker_parts(config, data), threads, public, self._service)
        self._evaluations = count()
        self.facts = self._worker.facts()
        fitting = 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // threads)
        self._threads = ThreadPoolExecutor(
            config.runtime.workers or fitting, "worker", torch.set_num_threads, (threads,)
        )
        self._config, self._memory = config, memory
        self._data = data
        self._needs, self.notes = needs_of(config, data, self.facts)
        self._parts: dict[Key, Examples] = {}
        self._shards: dict[str, list[Examples]] = {}

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train the groups on as many threads as there are workers."""
        parts = [{("train", t.client): client_part(self._data, t.client) for t in tasks} for tasks in groups]
        self._keep_prepared(parts)
        return self._threads.map(lambda tasks, own: self._worker.train(round, tasks, *self._of(own)), groups, parts)

    def personalize(
        self, tuning: Tuning, round: int, groups: Sequence[Sequence[Task]], robust: np.ndarray
    ) -> Iterator[list[Point]]:
        """Tune the groups on as many threads as there are workers."""
        parts = [personal_parts(self._data, tasks, robust) for tasks in groups]
        self._keep_prepared(parts)
        return self._threads.map(
            lambda tasks, own: self._worker.personalize(tuning, round, tasks, *self._of(own)), groups, parts
        )

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict shard by shard."""

        evaluation = next(self._evaluations)

        def predict(shard: int, part: Part, prepared: Examples) -> Predictions:
            inputs = part.inputs() if self._needs.inputs else None
            return self._worker.predict(params, prepared, inputs, (evaluation, shard))

        return Predictions.concatenate(list(self._threads.map(predict, count(), *self._split(split))))

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict client by client."""
        _, prepared = self._split(split)
        view: View = getattr(self._data, split)
        evaluation = next(self._evaluations)

        def predict(client: int) -> Predictions:
            inputs = view.inputs(indices[client]) if self._needs.inputs else None
            request = (evaluation, client)
            return self._worker.predict_client(models[client], indices[client], inputs, *prepared, request=request)

        return dict(zip(models, self._threads.map(predict, models), strict=True))

    def queries(self) -> dict[int, int]:
        """What the service in this process has counted."""
        return self._service.counts() if self._service is not None else {}

    def resume(self, queries: Mapping[int, int]) -> None:
        """Tell the service in this process."""
        if self._service is not None:
            self._service.resume(queries)

    def close(self) -> None:
        """Drop what is waiting, and forget prepared features."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._parts.clear()
        self._shards.clear()

    def _keep_prepared(self, groups: Sequence[Mapping[Key, Part]]) -> None:
        """Prepare what the groups need and is not there yet."""
        new = {key: part for parts in groups for key, part in parts.items() if key not in self._parts}
        self._parts.update(zip(new, self._prepared(list(new.values())), strict=True))

    def _of(self, parts: Mapping[Key, Part]) -> list[Examples | Inputs]:
        """What is prepared of the parts and then, where every step needs them, their inputs."""
        inputs = [part.inputs() for part in parts.values()] if self._needs.inputs else []
        return [*(self._parts[key] for key in parts), *inputs]

    def _prepared(self, parts: Sequence[Part]) -> list[Examples]:
        return list(self._threads.map(self._prepare, parts))

    def _prepare(self, part: Part) -> Examples:
        examples, keep_tokens = part.unprepared(), self._needs.tokens
        if not self._needs.anything:
            return examples
        inputs = part.inputs()
        if self._memory is None:
            return self._worker.prepare(examples, inputs, keep_tokens)
        what, raw = f"{self.facts.prepared}, kept {keep_tokens}", replace(examples, inputs=inputs)
        return self._memory.get(self._config, what, raw, lambda: self._worker.prepare(examples, inputs, keep_tokens))

    def _split(self, split: SplitName) -> tuple[list[Part], list[Examples]]:
        """The shards of a split, and what is prepared of them."""
        parts = shards(getattr(self._data, split), self._config.local.batch_size)
        if split not in self._shards:
            self._shards[split] = self._prepared(parts)
        return parts, self._shards[split]
