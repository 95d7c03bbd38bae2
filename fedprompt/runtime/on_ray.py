"""A run on Ray, seen from the command line's process: connect, start the driver actor, pass on what it says."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from fedprompt.config import Config
from fedprompt.runtime.driver import Driver
from fedprompt.runtime.federation import Record, RunFailed

DRIVER_RESTARTS = 3


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Be connected to the cluster at ``runtime.address``, or to one of this machine's own that ends with the run."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    already = ray.is_initialized()
    if not already:
        address = config.runtime.address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, include_dashboard=False if address == "local" else None, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def run_on_ray(config: Config, output: Path) -> Iterator[Record]:
    """Yield what the driver actor says, restarting it from its last checkpoint when it dies.

    Ctrl-C asks the driver to save after the round under way, waits for that, and is raised again.
    """
    with connected(config):
        options = {"num_cpus": 0, "max_restarts": DRIVER_RESTARTS, "max_concurrency": 2}
        driver = ray.remote(Driver).options(**options).remote(config, str(output.resolve()))
        for attempt in range(DRIVER_RESTARTS + 1):
            stream = driver.run.options(num_returns="streaming").remote()
            try:
                yield from _messages(stream)
                return
            except KeyboardInterrupt:
                ray.get(driver.stop.remote())
                for _ in _messages(stream):
                    pass
                raise
            except ray.exceptions.RayActorError:
                if attempt == DRIVER_RESTARTS:
                    raise RunFailed(
                        f"the driver died {attempt + 1} times; --resume continues from its checkpoint"
                    ) from None
                yield {"note": "the driver died; it starts anew from its last checkpoint"}


def _messages(stream: ray.ObjectRefGenerator) -> Iterator[Record]:
    for reference in stream:
        yield ray.get(reference)
