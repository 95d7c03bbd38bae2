"""What a run costs beside its work: the way to its first local step, the cost of a client's task, the rest of a round.

Start: a process for itself does what a run does until the first client has trained, and tells how long each part took.
Task: clients with one image each train a linear head on a tiny backbone, so that nearly nothing is left but the task;
in-process and on one Ray worker, each client alone and twenty in a group. Rest: rounds of the demo on Ray, as they come
out of the driver; what is neither local training nor aggregation nor evaluation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click

from fedprompt.algorithms.base import State
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.programs import program
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.pool import InProcessPool, Pool
from fedprompt.runtime.ray.on_ray import connected, run_on_ray
from fedprompt.runtime.ray.places import reserved, waited
from fedprompt.runtime.ray.pool import RayPool
from fedprompt.seeding import Stream, generator

TINY = ("backbone.name=test_vit", "backbone.weights=random", "backbone.image_size=32", "prompt.layer=2")
CLIENTS, GROUP = 200, 20
TRIVIAL = (
    *(*TINY, "algorithm.name=head", "head.kind=linear", "data.name=digits", "partition.kind=iid"),
    *("partition.min_size=1", "local.epochs=1", "runtime.workers=1", "runtime.address=local"),
)
START = """
import time
laps = [("", time.perf_counter())]
def lap(name):
    laps.append((name, time.perf_counter()))
import json, sys, tempfile
import ray
from benchmarks.overhead import first_task
from fedprompt.config.parsing import load
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.ray.driver import Driver
from fedprompt.runtime.ray.on_ray import connected
from fedprompt.runtime.ray.places import reserved, waited
from fedprompt.runtime.ray.pool import RayPool
lap("imports")
config = load(None, sys.argv[1:])
with connected(config, lambda line: None), reserved(config) as places:
    list(waited(places))
    lap("Ray")
    driver = ray.remote(Driver).options(num_cpus=0).remote(config, tempfile.gettempdir(), places)
    ray.get(driver.stop.remote())
    lap("driver process")
    data, algorithm = build_data(config), build_algorithm(config)
    lap("data")
    pool = RayPool(config, data, places)
    lap("worker processes, weights")
    list(pool.train(1, [[first_task(config, algorithm, pool)]]))
    lap("first client: features and training")
print(json.dumps({name: now - before for (_, before), (name, now) in zip(laps, laps[1:])}))
"""


def main(json_path: Path | None, quick: bool = False) -> None:
    """Measure and print; ``quick`` is a small case that shows that it works."""
    result = {
        "start_seconds": _start(1 if quick else 5, TINY if quick else ()),
        "task_microseconds": _tasks(1 if quick else 5),
        "rest": _rest(2, (*TINY, "data.limit=500")) if quick else _rest(6, ()),
    }
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def first_task(config: Config, algorithm: Any, pool: Pool) -> Any:
    """The task of client 0 in the first round."""
    return _task(config, algorithm, _first_state(config, algorithm, pool), 0)


def _first_state(config: Config, algorithm: Any, pool: Pool) -> State:
    return algorithm.init(pool.facts.params, generator(config.seed, Stream.INIT, 0, 1))


def _task(config: Config, algorithm: Any, state: State, client: int) -> Any:
    return algorithm.task(state, client, algorithm.epochs(config.local.epochs))


def _start(repetitions: int, overrides: Sequence[str]) -> dict[str, float]:
    """Median seconds of each part of the way from the command to the end of the first client's training."""
    command = [sys.executable, "-c", START, "runtime.address=local", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = []
    for _ in range(repetitions):
        ended = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        told.append(json.loads(ended.stdout.splitlines()[-1]))
    parts = {name: median(one[name] for one in told) for name in told[0]}
    click.echo(f"from the command to the first client's update: {sum(parts.values()):.1f} s (median of {repetitions})")
    for name, seconds in parts.items():
        click.echo(f"  {name:<38}{seconds:7.2f} s")
    return parts


def _tasks(repetitions: int) -> dict[str, float]:
    """Median microseconds per client of a trivial task."""
    images = round(CLIENTS / 0.9) + 1
    sizes = (f"federation.clients={CLIENTS}", f"federation.cohort={CLIENTS}", f"data.limit={images}")
    config = load(None, [*TRIVIAL, *sizes])
    times: dict[str, list[float]] = {}
    with _pools(config) as pools:
        for _ in range(repetitions + 1):  # the first time prepares features
            for where, pool in pools.items():
                for size in (1, GROUP):
                    name = f"{where}, {'alone' if size == 1 else f'{size} in a group'}"
                    times.setdefault(name, []).append(_round_of_tasks(config, pool, size))
    found = {name: 1e6 * median(seconds[1:]) / CLIENTS for name, seconds in times.items()}
    click.echo(f"one client's task, one image, a linear head ({CLIENTS} clients, median of {repetitions}):")
    for name, microseconds in found.items():
        click.echo(f"  {name:<38}{microseconds:7.0f} us")
    return found


@contextmanager
def _pools(config: Config) -> Iterator[dict[str, Pool]]:
    data = build_data(config)
    with connected(config, click.echo), reserved(config) as places:
        list(waited(places))
        pools = {"in-process": InProcessPool(config, data), "Ray": RayPool(config, data, places)}
        try:
            yield pools
        finally:
            for pool in pools.values():
                pool.close()


def _round_of_tasks(config: Config, pool: Pool, size: int) -> float:
    """Seconds in which all clients train, in groups of ``size``."""
    algorithm = build_algorithm(config)
    state = _first_state(config, algorithm, pool)
    tasks = [_task(config, algorithm, state, client) for client in range(CLIENTS)]
    start = time.perf_counter()
    updates = [u for done in pool.train(1, [tasks[i : i + size] for i in range(0, CLIENTS, size)]) for u in done]
    seconds = time.perf_counter() - start
    assert sum(len(update.clients) for update in updates) == CLIENTS
    return seconds


def _rest(rounds: int, overrides: Sequence[str]) -> dict[str, float]:
    """Seconds of the demo's rounds on Ray by part; the first round, which prepares features, does not count."""
    config = load(None, [f"federation.rounds={rounds}", "runtime.address=local", *overrides])
    parts: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, closing(run_on_ray(config, Path(folder))) as records:
        before = time.perf_counter()
        for record in records:
            now = time.perf_counter()
            if record.get("round", 0) > 1:
                known = {stage: record["seconds"][stage] for stage in ("train", "aggregate", "evaluate")}
                parts.append({**known, "rest": now - before - sum(known.values())})
            before = now
    found = {stage: median(part[stage] for part in parts) for stage in parts[0]}
    share = found["rest"] / sum(found.values())
    click.echo(f"a round of the demo on Ray, {sum(found.values()):.2f} s (median of {len(parts)}):")
    for stage, seconds in found.items():
        click.echo(f"  {stage:<38}{seconds:7.2f} s")
    click.echo(f"  {'rest':<38}{share:7.1%} of the round")
    return {**found, "rest_share": share}


if __name__ == "__main__":
    program(main)
