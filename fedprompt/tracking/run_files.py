"""The files that every run writes: ``metrics.jsonl``, ``pools/`` and ``result.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedprompt.config.schema import Config
from fedprompt.tracking.files import plain, write_atomic
from fedprompt.tracking.metrics import MetricsFile, Record
from fedprompt.tracking.pools import PoolSnapshots
from fedprompt.tracking.tracker import Tracker

OWN_FILES = ("metrics.jsonl", "result.json", "accuracy.png", "trajectory.png", "partition.png")


class RunFiles(Tracker):
    """What reports, a resume and other trackers read. A new run deletes what an earlier one left in the folder.

    A full disk or a folder that cannot be written surfaces as ``OSError``.
    """

    def __init__(self, output: Path, config: Config, resume_round: int | None) -> None:
        super().__init__(output, config, resume_round)
        path = output / "metrics.jsonl"
        if resume_round is None:
            for name in OWN_FILES:
                (output / name).unlink(missing_ok=True)
            self._metrics = MetricsFile(path)
        else:
            self._metrics = MetricsFile.resume(path, resume_round)
        self._pools = PoolSnapshots(output / "pools", resume_round)

    def round(self, record: Record, prompts: Mapping[str, Tensor]) -> None:
        """Write the round's line, and the tensor named pool or prompt [..., D]."""
        self._metrics.append(record)
        pool = prompts.get("pool", prompts.get("prompt"))
        if pool is not None:
            self._pools.add(record["round"], pool.detach().float().cpu().reshape(-1, pool.shape[-1]).numpy())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``."""
        content = json.dumps(plain(result), indent=2, allow_nan=False) + "\n"
        write_atomic(self.output / "result.json", content.encode())
