"""TensorBoard: an event file in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedprompt.config.schema import Config
from fedprompt.tracking.files import named
from fedprompt.tracking.metrics import Record
from fedprompt.tracking.registry import tracker
from fedprompt.tracking.tracker import Tracker


@tracker("tensorboard", "scalars, histograms of prompts, figures and projector in tensorboard/")
class TensorBoardTracker(Tracker):
    """Writes ``tensorboard/``. TensorBoard and plots are imported here: that takes a second."""

    def __init__(self, output: Path, config: Config, resume_round: int | None) -> None:
        from fedprompt.tracking.tensorboard import TensorBoard

        super().__init__(output, config, resume_round)
        self._folder = output / "tensorboard"
        self._board = TensorBoard(self._folder, resume_round)

    def start(self, class_counts: np.ndarray, class_names: Sequence[str], config_text: str) -> None:
        """Write the partition's figure and the configuration; on a resume the earlier event file has both."""
        if self.resume_round is None:
            with named(self._folder):
                self._board.figure("figures/partition", self.drawings.partition(class_counts, class_names), 0)
                self._board.text("config", f"```yaml\n{config_text}\n```", 0)
                self._board.flush()

    def round(self, record: Record, prompts: Mapping[str, Tensor]) -> None:
        """Write scalars and histograms."""
        with named(self._folder):
            self._board.scalars(record)
            self._board.prompts(record["round"], prompts)
            self._board.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write figures and the projector."""
        last_round = max((record["round"] for record in self.drawings.records), default=0)
        if self.drawings.pools:
            self._board.projector(self.drawings.pools)
        for name, figure in self.drawings.final.items():
            with named(self._folder):
                self._board.figure(f"figures/{name}", figure, last_round)

    def close(self) -> None:
        """Close the event file."""
        with named(self._folder):
            self._board.close()
