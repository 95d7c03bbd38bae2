"""Figures in the run's folder: the partition at the start; accuracy and the prompts' trajectory at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedprompt.tracking.registry import tracker
from fedprompt.tracking.tracker import Tracker


@tracker("figures", "partition.png, accuracy.png and trajectory.png in the run's folder")
class Figures(Tracker):
    """Saves the run's figures."""

    def start(self, class_counts: np.ndarray, class_names: Sequence[str], config_text: str) -> None:
        """Draw the partition."""
        from fedprompt.tracking.plots import save

        save(self.drawings.partition(class_counts, class_names), self.output / "partition.png")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Draw accuracy and trajectory."""
        from fedprompt.tracking.plots import save

        for name, figure in self.drawings.final.items():
            save(figure, self.output / f"{name}.png")
