"""The driver actor: it holds the federation, runs matching and the generative update, and owns the workers.

When it dies, or the node that it lives on, another one is started in its place (``on_ray.py``). That one continues from
the newest checkpoint, so at most the round under way is lost; the workers die with the driver that owns them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from ray.util.placement_group import PlacementGroup

from fedprompt import allocation
from fedprompt.blackbox.access import VARIABLE
from fedprompt.config.schema import Config
from fedprompt.failure import UNTOLD, told
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints.resuming import start_of
from fedprompt.runtime.federation import LOADING_DATA, LOADING_MODEL, Federation, Record, Stopped
from fedprompt.runtime.folders.locks import NOBODY, Held, PassedOn
from fedprompt.runtime.pool import threads_per_worker
from fedprompt.runtime.ray.pool import RayPool


class Driver:
    """One run on a Ray cluster, with its workers at ``places``, for a command that holds the folders ``held``.

    ``run`` yields stages, records and, last, one of ``result``, ``error`` (with exit code) and ``stopped``.
    """

    def __init__(
        self,
        config: Config,
        output: str,
        places: PlacementGroup,
        held: Held | PassedOn = NOBODY,
        token: str | None = None,
    ) -> None:
        allocation.prepare()
        if token is not None:  # of a black-box service: a cluster's processes have not the command's environment
            os.environ[VARIABLE] = token
        self._config, self._output, self._places, self._held = config, Path(output), places, held
        self._federation: Federation | None = None
        self._stop = False

    def run(self) -> Iterator[Record]:
        """Run to the end, from the newest checkpoint where there is one."""
        torch.set_num_threads(threads_per_worker(self._config))  # as in one process, for the aggregation
        pool, folders = None, ExitStack()
        try:
            held = folders.enter_context(self._held.joined())
            start = start_of(self._config, self._output)
            yield {"stage": LOADING_DATA}
            data = build_data(self._config)
            start.check_data(self._config, data.fingerprint)
            algorithm = build_algorithm(self._config)
            yield {"stage": f"starting workers, {LOADING_MODEL}"}
            pool = RayPool(self._config, data, self._places)
            self._federation = Federation(self._config, algorithm, data, pool, start, self._output, held.check)
            if self._stop:
                self._federation.stop()
            yield {"stage": self._federation.opening}
            yield from self._federation.run()
        except Stopped:
            yield {"stopped": True}
        except UNTOLD:
            raise
        except BaseException as error:  # some libraries' panics are no Exceptions
            if pool is not None and pool.has_lost_its_service():
                os._exit(1)  # its counts are gone; the next driver goes on from the checkpoint, which has them
            yield told(error, self._output, self._config.to_yaml())
        finally:
            if pool is not None:
                pool.close()
            folders.close()

    def stop(self) -> None:
        """Ask for a checkpoint and the end, after the round under way."""
        self._stop = True
        if self._federation is not None:
            self._federation.stop()
