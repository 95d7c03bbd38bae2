"""The pool of Ray workers: one frozen backbone and a share of a GPU per worker, data in this process.

Workers of this process's host read inputs where they lie; where a worker cannot, or a data set's inputs are not made to
be mapped, it gets copies through the object store, for one call each. What is prepared of inputs is computed once, by
one worker, and put into the object store by this process. So all data lies on this process's host: whichever other host
fails, nothing is lost but time. A worker that dies is started anew by Ray and its call repeated; a call's result
depends on its arguments alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedprompt import allocation
from fedprompt.client.evaluate import Predictions
from fedprompt.client.personal import Point, Tuning
from fedprompt.client.tasks import Task, Update
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData, View
from fedprompt.data.images import NotHere
from fedprompt.data.inputs import Shared
from fedprompt.models.params import Params
from fedprompt.runtime import worker as processes
from fedprompt.runtime.build import build_remote, worker_parts
from fedprompt.runtime.memory import check_memory
from fedprompt.runtime.pool import (
    Key,
    Part,
    SplitName,
    client_part,
    needs_of,
    needs_public,
    personal_parts,
    public_split,
    shards,
    threads_per_worker,
)
from fedprompt.runtime.ray.places import shares
from fedprompt.runtime.ray.service import RayService, start_service

RESTARTS = 3  # times that Ray restarts a worker, and repeats one call, before the run fails
UNREACHABLE = 60  # seconds that a worker may be out of reach, until its host is known to be dead or is back


class Worker(processes.Worker):
    """A worker in a process of its own, which Ray calls by the name of this class."""

    def __init__(self, *arguments: Any) -> None:
        allocation.prepare()
        super().__init__(*arguments)


ClientWorker = ray.remote(Worker)
# Makes one call on the worker that it is given: the result, and what Ray needs to repeat the call
Call = Callable[[Any], tuple[ray.ObjectRef, Sequence[Any]]]


def _largest_host() -> int:
    """Bytes of memory that the cluster's largest host gives to Ray, objects included."""
    given = [host["Resources"] for host in ray.nodes() if host["Alive"]]
    return int(max(host.get("memory", 0) + host.get("object_store_memory", 0) for host in given))


class RayPool:
    """Workers on a Ray cluster that is already connected, at ``places`` that are theirs."""

    def __init__(self, config: Config, data: FederatedData, places: PlacementGroup) -> None:
        check_memory(config, data, _largest_host())
        there = PlacementGroupSchedulingStrategy(places)
        options = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS, "scheduling_strategy": there}
        threads, classes = threads_per_worker(config), len(data.class_names)
        self._service = None
        if config.blackbox.address is not None and config.is_blackbox:
            self._service = build_remote(config, classes)
        elif config.is_blackbox:
            at_once = threads * len(shares(config))  # it computes while they wait
            self._service = start_service(config, classes, public_split(data), places, at_once)
        # one copy for all, which has to be there still when one of them is started anew
        self._public = ray.put(public_split(data)) if needs_public(config) else None
        arguments = (worker_parts(config, data), threads, self._public, self._service)
        self.workers = [
            ClientWorker.options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0), **options).remote(*arguments)
            for share in shares(config)
        ]
        self.facts = ray.get(self.workers[0].facts.remote())
        self._needs, self.notes = needs_of(config, data, self.facts)
        self._data, self._batch_size = data, config.local.batch_size
        self._elsewhere: set[Any] = set()  # workers that cannot map this process's memory
        self._prepared: dict[Key, ray.ObjectRef] = {}
        self._evaluations = count()

    def train(self, round: int, groups: Sequence[Sequence[Task]]) -> Iterator[list[Update]]:
        """Train the groups on whichever workers are free, those with the most work first."""
        parts = [{("train", task.client): client_part(self._data, task.client) for task in tasks} for tasks in groups]
        return self._of_groups(groups, parts, lambda worker, tasks: partial(worker.train.remote, round, tasks))

    def personalize(
        self, tuning: Tuning, round: int, groups: Sequence[Sequence[Task]], robust: np.ndarray
    ) -> Iterator[list[Point]]:
        """Tune the groups on whichever workers are free, those with the most work first."""
        parts = [personal_parts(self._data, tasks, robust) for tasks in groups]
        return self._of_groups(
            groups, parts, lambda worker, tasks: partial(worker.personalize.remote, tuning, round, tasks)
        )

    def predict(self, split: SplitName, params: Params) -> Predictions:
        """Predict the shards of a split on all workers."""
        sent, parts, evaluation = ray.put(params), self._prepared_shards(split), next(self._evaluations)

        def call(key: Key) -> Call:
            def submit(worker: Any) -> tuple[ray.ObjectRef, list[Any]]:
                inputs, request = self._inputs_for(worker, [parts[key]]), (evaluation, key[1])
                return worker.predict.remote(sent, self._prepared[key], *inputs, request=request), inputs

            return submit

        predicted = dict(self._results([call(key) for key in parts]))
        return Predictions.concatenate([predicted[i] for i in range(len(parts))])

    def predict_clients(
        self, split: SplitName, models: Mapping[int, Params], indices: Mapping[int, np.ndarray]
    ) -> dict[int, Predictions]:
        """Predict for one client after the other, on all workers."""
        prepared = [self._prepared[key] for key in self._prepared_shards(split)]
        view: View = getattr(self._data, split)
        evaluation = next(self._evaluations)

        def call(client: int) -> Call:
            def submit(worker: Any) -> tuple[ray.ObjectRef, list[Any]]:
                own, request = indices[client], (evaluation, client)
                inputs = self._inputs_for(worker, [Part(view, own)]) or [None]
                result = worker.predict_client.remote(models[client], own, *inputs, *prepared, request=request)
                return result, inputs

            return submit

        predicted = dict(self._results([call(client) for client in models]))
        return {client: predicted[i] for i, client in enumerate(models)}

    def queries(self) -> dict[int, int]:
        """What the service has counted."""
        return self._service.counts() if self._service is not None else {}

    def resume(self, queries: Mapping[int, int]) -> None:
        """Tell the service."""
        if self._service is not None:
            self._service.resume(queries)

    def has_lost_its_service(self) -> bool:
        """Whether there is a black-box model that has died."""
        try:
            self.queries()
        except ray.exceptions.RayActorError:
            return True
        return False

    def close(self) -> None:
        """End the workers; what they and this pool put into the object store goes with the references."""
        for worker in self.workers:
            ray.kill(worker)
        self.workers.clear()
        if isinstance(self._service, RayService):
            self._service.close()

    def _of_groups(
        self, groups: Sequence[Sequence[Task]], parts: Sequence[Mapping[Key, Part]], ask: Callable[..., Callable]
    ) -> Iterator[Any]:
        """Ask a worker about every group, with what is prepared of the group's parts and their inputs; as they come."""
        self._prepare({key: part for of_group in parts for key, part in of_group.items()})

        def call(tasks: Sequence[Task], own: Mapping[Key, Part]) -> Call:
            def submit(worker: Any) -> tuple[ray.ObjectRef, list[Any]]:
                inputs, prepared = self._inputs_for(worker, own.values()), (self._prepared[key] for key in own)
                return ask(worker, tasks)(*prepared, *inputs), inputs

            return submit

        return (result for _, result in self._results([call(*group) for group in zip(groups, parts, strict=True)]))

    def _prepared_shards(self, split: SplitName) -> dict[Key, Part]:
        """The shards of a split, in order, of which everything is prepared."""
        parts = {(split, i): part for i, part in enumerate(shards(getattr(self._data, split), self._batch_size))}
        self._prepare(parts)
        return parts

    def _prepare(self, parts: Mapping[Key, Part]) -> None:
        """Have the workers compute what is not prepared yet, and keep it."""
        new = {key: part for key, part in parts.items() if key not in self._prepared}
        if not self._needs.anything:
            self._prepared.update((key, ray.put(part.unprepared())) for key, part in new.items())
            return

        def call(part: Part) -> Call:
            def submit(worker: Any) -> tuple[ray.ObjectRef, list[Any]]:
                inputs = self._sent(worker, part)
                return worker.prepare.remote(part.unprepared(), inputs, self._needs.tokens), [inputs]

            return submit

        keys = list(new)
        for i, examples in self._results([call(part) for part in new.values()]):
            self._prepared[keys[i]] = ray.put(examples)

    def _inputs_for(self, worker: Any, parts: Iterable[Part]) -> list[Any]:
        """The inputs of parts as the worker can read them; none where no step needs them."""
        return [self._sent(worker, part) for part in parts] if self._needs.inputs else []

    def _sent(self, worker: Any, part: Part) -> Shared | ray.ObjectRef:
        """Where the worker finds a part's inputs: in this process's memory, or copies in the object store."""
        inputs = part.inputs()
        shared = None if worker in self._elsewhere else inputs.shared()
        return ray.put(inputs.copied()) if shared is None else shared

    def _results(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Make each call on a worker that is free; yields its number and result as they come.

        A call puts what it needs into the object store only when its turn comes, and that is held until the result is
        here: should its host fail before, Ray repeats the call.
        """
        idle, waiting = list(self.workers), iter(enumerate(calls))
        running: dict[ray.ObjectRef, tuple[int, Any, Sequence[Any]]] = {}
        patient_until: float | None = None
        while True:
            while idle and (following := next(waiting, None)) is not None:
                number, call = following
                worker = idle.pop(0)
                result, needed = call(worker)
                running[result] = number, worker, needed
            if not running:
                return
            (done,), _ = ray.wait(list(running))
            number, worker, _ = running.pop(done)
            try:
                result = ray.get(done)
            except NotHere:  # the worker's own host; it may also have moved there since it last could
                self._elsewhere.add(worker)
            except ray.exceptions.ActorUnavailableError:  # so Ray says, repeats used up, before a host counts as dead
                patient_until = patient_until or time.monotonic() + UNREACHABLE
                if time.monotonic() > patient_until:
                    raise
                time.sleep(1)
            else:
                patient_until = None
                idle.append(worker)
                yield number, result
                continue
            again, needed = calls[number](worker)
            running[again] = number, worker, needed
