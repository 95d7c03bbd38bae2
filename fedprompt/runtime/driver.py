"""The driver actor: it holds the federation, runs matching and the generative update, and owns the workers.

When it dies, or the node that it lives on, Ray starts it anew and its ``run`` is called again: it then continues from the
newest checkpoint, so at most the round under way is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ray
import torch

from fedprompt.config import Config
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints import CheckpointStore
from fedprompt.runtime.federation import Federation, Record, RunFailed, Stopped
from fedprompt.runtime.ray_pool import RayPool


class Driver:
    """One run on a Ray cluster. Messages of ``run`` are records, or one of ``error`` (exit code 2 or 1), ``stopped``."""

    def __init__(self, config: Config, output: str) -> None:
        self._config, self._output = config, Path(output)
        self._federation: Federation | None = None
        self._stop = False

    def run(self) -> Iterator[Record]:
        """Run to the end, from the newest checkpoint where there is one."""
        torch.set_num_threads(1)  # many small products: more threads gain little and suffer from Ray's own processes
        pool = None
        try:
            data = build_data(self._config)
            algorithm = build_algorithm(self._config)
            pool = RayPool(self._config, data)
            store = CheckpointStore(storage_of(self._config, self._output))
            self._federation = Federation(self._config, algorithm, data, pool, store, self._output)
            if self._stop:
                self._federation.stop()
            yield from self._federation.run()
        except InputError as error:
            yield {"error": str(error), "code": 2}
        except RunFailed as error:
            yield {"error": str(error), "code": 1}
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            code = 2 if isinstance(cause, InputError) else 1
            yield {"error": str(cause) if code == 2 else str(error), "code": code}
        except Stopped:
            yield {"stopped": True}
        finally:
            if pool is not None:
                pool.close()

    def stop(self) -> None:
        """Ask for a checkpoint and the end, after the round under way."""
        self._stop = True
        if self._federation is not None:
            self._federation.stop()


def storage_of(config: Config, output: Path) -> str:
    """Where checkpoints go: ``runtime.storage``, else the output folder."""
    return config.runtime.storage or str(output / "checkpoints")
