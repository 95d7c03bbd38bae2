"""Everything that a run writes about itself, bound together; it may live in another process than the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedprompt.tracking import metrics
from fedprompt.tracking.files import named, plain, write_atomic
from fedprompt.tracking.metrics import MetricsFile, Record
from fedprompt.tracking.plots import accuracy_figure, partition_figure, save, trajectory_figure
from fedprompt.tracking.pools import PoolSnapshots
from fedprompt.tracking.tensorboard import TensorBoard

OWN_FILES = ("metrics.jsonl", "result.json", "accuracy.png", "trajectory.png", "partition.png")


class Tracker:
    """Writes ``metrics.jsonl``, ``tensorboard/``, ``pools/``, figures and, at the end, ``result.json`` into ``output``.

    A full disk or a folder that cannot be written surfaces as ``OSError``.

    Args:
        output: the run's folder, made if needed.
        resume_round: the last round that counts, as saved in the checkpoint; what was written of later rounds goes.
            ``None`` starts afresh and deletes what an earlier tracker left here.
        tensorboard: write event files, too.
    """

    def __init__(self, output: Path, *, resume_round: int | None = None, tensorboard: bool = True):
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)
        self._resumed = resume_round is not None
        path = self.output / "metrics.jsonl"
        if resume_round is None:
            for name in OWN_FILES:
                (self.output / name).unlink(missing_ok=True)
            self._metrics = MetricsFile(path)
        else:
            self._metrics = MetricsFile.resume(path, resume_round)
        self._pools = PoolSnapshots(self.output / "pools", resume_round)
        self._board = TensorBoard(self.output / "tensorboard", resume_round) if tensorboard else None

    def start(self, class_counts: np.ndarray, class_names: Sequence[str], config_text: str) -> None:
        """Draw the partition, counts [N, K], and keep the configuration, as text, next to the curves."""
        figure = partition_figure(np.asarray(class_counts), class_names)
        save(figure, self.output / "partition.png")
        if self._board and not self._resumed:  # the earlier event file has both
            with named(self.output / "tensorboard"):
                self._board.figure("figures/partition", figure, 0)
                self._board.text("config", f"```yaml\n{config_text}\n```", 0)
                self._board.flush()

    def round(self, record: Record, prompts: Mapping[str, Tensor]) -> None:
        """Write a round: its metrics line, scalars and histograms; tensors named pool or prompt [..., D] are kept."""
        record = plain(record)
        self._metrics.append(record)
        if self._board:
            with named(self.output / "tensorboard"):
                self._board.scalars(record)
                self._board.prompts(record["round"], prompts)
                self._board.flush()
        pool = prompts.get("pool", prompts.get("prompt"))
        if pool is not None:
            self._pools.add(record["round"], pool.detach().float().cpu().reshape(-1, pool.shape[-1]).numpy())

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``, then draw the figures, and close."""
        content = json.dumps(plain(result), indent=2, allow_nan=False) + "\n"
        write_atomic(self.output / "result.json", content.encode())
        records = metrics.read(self._metrics.path) if self._metrics.path.exists() else []
        last_round = max((record["round"] for record in records), default=0)
        figures = {"accuracy": accuracy_figure(records)}
        pools = self._pools.load()
        if sum(len(pool) for pool in pools.values()) >= 2:
            figures["trajectory"] = trajectory_figure(pools)
            if self._board:
                self._board.projector(pools)
        for name, figure in figures.items():
            save(figure, self.output / f"{name}.png")
            if self._board:
                with named(self.output / "tensorboard"):
                    self._board.figure(f"figures/{name}", figure, last_round)
        self.close()

    def close(self) -> None:
        """Close the event file; what a run that stops early has written so far stays readable."""
        if self._board:
            with named(self.output / "tensorboard"):
                self._board.close()
