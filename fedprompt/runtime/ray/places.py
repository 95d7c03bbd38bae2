"""Where a run's workers go: a placement group, so that they get their places all at once, spread over the hosts.

Of two runs that ask for the same cores one waits, instead of each holding what the other needs. The command's process
asks for the places, not the driver actor: Ray takes them back when that process ends, but not when one of its actors
dies, and the driver that follows a dead one goes on in the same places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from fedprompt.config.schema import Config
from fedprompt.errors import InputError
from fedprompt.wording import counted

MOST_WORKERS = 64  # chosen by default, however large the cluster is
PATIENCE = 20  # seconds without room, until the user is told


def shares(config: Config) -> list[dict[str, float]]:
    """What every worker asks for: as many as are configured, else as the cluster carries.

    Raises InputError where the whole cluster has no room for them.
    """
    runtime, cluster = config.runtime, ray.cluster_resources()
    cpus, all_gpus = runtime.cpus_per_worker, cluster.get("GPU", 0.0)
    gpus = 0 if config.is_blackbox else _gpus(config)
    room = int(cluster.get("CPU", 0.0) / cpus)
    if gpus:
        room = min(room, int(all_gpus / gpus))
    if room < 1 or room < (runtime.workers or 1):
        raise InputError(
            f"runtime.workers: {runtime.workers or 1} with {cpus:g} CPUs and {gpus:g} GPUs each do not fit the "
            f"cluster's {cluster.get('CPU', 0):g} CPUs and {all_gpus:g} GPUs; allowed here: at most {room}"
        )
    share = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
    return [share] * (runtime.workers or min(room, MOST_WORKERS))


def _gpus(config: Config) -> float:
    """What each process with a backbone gets: as configured, else a whole one where there are any."""
    configured = config.runtime.gpus_per_worker
    return configured if configured is not None else float(ray.cluster_resources().get("GPU", 0.0) > 0)


def service_share(config: Config) -> dict[str, float]:
    """What the service of a black-box run asks for beside the workers: a worker's share of a GPU, or nothing.

    Its workers have no backbone, so they need no GPU.
    """
    gpus = _gpus(config) if config.is_blackbox and config.blackbox.address is None else 0
    there = ray.cluster_resources().get("GPU", 0.0)
    if gpus > there:
        raise InputError(f"runtime.gpus_per_worker: {gpus:g}, but the cluster has {there:g} GPUs; allowed here: 0")
    return {"GPU": gpus} if gpus else {}


def bundles(config: Config) -> list[dict[str, float]]:
    """All that a run asks for: its workers' shares, and last its service's where that has one."""
    service = service_share(config)
    return [*shares(config), *([service] if service else [])]


@contextmanager
def reserved(config: Config) -> Iterator[PlacementGroup]:
    """Ask for the places of a run's processes, and give them back in the end; ``waited`` waits for them."""
    places = placement_group(bundles(config), "SPREAD")
    try:
        yield places
    finally:
        remove_placement_group(places)


def waited(places: PlacementGroup) -> Iterator[str]:
    """Wait until the places are there; yields a line that says what for, once, where that takes long."""
    patient_until = time.monotonic() + PATIENCE
    while not places.wait(1):
        if time.monotonic() > patient_until:
            patient_until = math.inf
            yield _wanted(places)


def _wanted(places: PlacementGroup) -> str:
    """What the workers need, next to what is free."""
    total, free = ray.cluster_resources(), ray.available_resources()
    needs = [
        f"{share:g} {name}{'s' * (share != 1)} each "
        f"({free.get(name, 0.0):g} of the cluster's {total.get(name, 0.0):g} are free)"
        for name, share in places.bundle_specs[0].items()
    ]
    return f"waiting for room for {counted(len(places.bundle_specs), 'worker')} with {' and '.join(needs)}"
