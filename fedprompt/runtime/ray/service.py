"""The black box as a Ray actor of its own, on the driver's host; workers hold its handle and nothing else of it.

Where there is no GPU it computes on the workers' cores, which wait for it meanwhile. It dies with the pool that made it
and takes its counts with it: the driver, which has them in its checkpoint, then dies, too, and the next one goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from fedprompt import allocation
from fedprompt.blackbox.batching import Batcher, Desk
from fedprompt.blackbox.service import Ledger, Request, Scorer, is_answerable, no_scores
from fedprompt.config.schema import Config
from fedprompt.data import Split
from fedprompt.runtime.build import build_scorer
from fedprompt.runtime.ray.places import service_share

REQUESTS_AT_ONCE = 1000  # that may wait: far more than there are workers


class ServiceActor:
    """The service, whose requests are answered together where they come together."""

    def __init__(self, config: Config, classes: int, public: Split, threads: int) -> None:
        allocation.prepare()
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")
        self._config, self._classes, self._public = config, classes, public
        self._ledger = Ledger(config.blackbox.budget)

    @cached_property
    def _scorer(self) -> Scorer:
        """Made when first asked for: only a method can fail in a way that tells the user why."""
        return build_scorer(self._config, self._classes, self._public)

    @cached_property
    def _desk(self) -> Desk:
        return Desk(Batcher(self._scorer))

    async def scores(self, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Count, then answer, together with whoever else waits."""
        if not is_answerable(images):
            return no_scores(images, self._classes)
        return await self._desk.scores(self._ledger, client, images, request)

    async def counts(self) -> dict[int, int]:
        """Queries so far by client."""
        return self._ledger.counts()

    async def model_bytes(self) -> int:
        """Size of the model's weights."""
        return self._scorer.bytes

    async def resume(self, counts: Mapping[int, int]) -> None:
        """Go on from the counts of an earlier part of the same run."""
        self._ledger.resume(counts)


class RayService:
    """The service as a caller sees it, wherever the actor is."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def scores(self, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Ask, and wait for the answer."""
        return ray.get(self._actor.scores.remote(client, images, request))

    def counts(self) -> dict[int, int]:
        """Queries so far by client."""
        return ray.get(self._actor.counts.remote())

    def model_bytes(self) -> int:
        """Size of the model's weights."""
        return ray.get(self._actor.model_bytes.remote())

    def resume(self, counts: Mapping[int, int]) -> None:
        """Go on from the counts of an earlier part of the same run."""
        ray.get(self._actor.resume.remote(dict(counts)))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._actor)


def start_service(config: Config, classes: int, public: Split, places: PlacementGroup, threads: int) -> RayService:
    """Start the actor: on the GPU that is reserved for it, else on this process's host."""
    share = service_share(config)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    where = PlacementGroupSchedulingStrategy(places, len(places.bundle_specs) - 1) if share else here
    options = {"num_cpus": 0, "num_gpus": share.get("GPU", 0), "max_concurrency": REQUESTS_AT_ONCE}
    actor = ray.remote(ServiceActor).options(scheduling_strategy=where, **options)
    return RayService(actor.remote(config, classes, public, threads))
