"""A run on Ray, seen from the command line's process: connect, start the driver actor, pass on what it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedprompt import interrupts
from fedprompt.blackbox.access import given_token
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.errors import RunFailed
from fedprompt.failure import told_in_one_line
from fedprompt.runtime.federation import Record
from fedprompt.runtime.folders.locks import NOBODY, Held
from fedprompt.runtime.pool import threads_per_worker
from fedprompt.runtime.ray.clusters import connect
from fedprompt.runtime.ray.driver import Driver
from fedprompt.runtime.ray.places import reserved, waited
from fedprompt.runtime.ray.pool import RayPool

DRIVER_RESTARTS = 3
STOPPING = "stopping after the round under way; Ctrl-C again stops at once"


@contextmanager
def connected(config: Config, say: Callable[[str], None]) -> Iterator[None]:
    """Be connected to the cluster at ``runtime.address`` or RAY_ADDRESS, or to one of this machine's own.

    A process that is connected already stays so. Errors and ``say``: as ``connect`` has them.
    """
    with nullcontext() if ray.is_initialized() else connect(config.runtime.address, say):
        yield


def run_on_ray(config: Config, output: Path, held: Held = NOBODY) -> Iterator[Record]:
    """Yield what the driver actor says; when it dies, another one continues from its last checkpoint.

    ``held``: the folders that it writes to.

    After Ctrl-C the driver saves and ends after the round under way; its last word is then ``stopped``. The driver is
    on this process's host, where ``output`` is; workers may be on any, where files must have the same absolute path.
    """
    notes: list[str] = []
    with connected(config, notes.append), reserved(config) as places:
        yield from ({"note": line} for line in notes)
        # Not soft: Ray does not always keep to that, and with this host this process would end as well.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_concurrency": 2, "scheduling_strategy": here}
        yield {"stage": "waiting for places for the workers"}
        yield from ({"note": line} for line in waited(places))
        yield {"stage": "starting the driver"}
        arguments = config, str(output.resolve()), places, held.passed_on(), given_token()
        for _ in range(DRIVER_RESTARTS + 1):
            driver = ray.remote(Driver).options(**options).remote(*arguments)
            try:
                yield from _messages(driver)
                return
            except ray.exceptions.RayActorError:
                yield {"note": "the driver died; another one continues from its last checkpoint"}
            finally:
                ray.kill(driver)
        raise RunFailed(f"the driver died {DRIVER_RESTARTS + 1} times; --resume continues from its checkpoint")


@contextmanager
def pool_on_ray(config: Config, data: FederatedData, output: Path, say: Callable[[str], None]) -> Iterator[RayPool]:
    """Workers for something else than a run, driven by this process; ``say`` is told what is waited for.

    What workers raise comes out in one line, as InputError or RunFailed, with details in ``output``.
    """
    torch.set_num_threads(threads_per_worker(config))  # as in one process, for what is made for clients here
    with connected(config, say), reserved(config) as places:
        for line in waited(places):
            say(line)
        with told_in_one_line(output, config.to_yaml()), closing(RayPool(config, data, places)) as pool:
            yield pool


def _messages(driver: Any) -> Iterator[Record]:
    stream = driver.run.options(num_returns="streaming").remote()
    try:
        yield from map(ray.get, stream)
    except KeyboardInterrupt:
        yield {"note": STOPPING}
        interrupts.again()
        yield from _last_words(driver, stream)
    except GeneratorExit:  # interrupted while our caller was at work with a record
        interrupts.again()
        for _ in _last_words(driver, stream):
            pass
        raise


def _last_words(driver: Any, stream: Any) -> Iterator[Record]:
    """Have the driver stop, and yield what it still says; the signal may have ended Ray's processes as well."""
    try:
        ray.get(driver.stop.remote())
        yield from map(ray.get, stream)
    except ray.exceptions.RayError:
        yield {"stopped": True}
