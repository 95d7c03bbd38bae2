"""The figures of a run, drawn once from the files in its folder for all trackers that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.tracking import metrics
from fedprompt.tracking.pools import load_pools

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Drawings:
    """What the folder ``output`` holds of a run, and its figures; each is read or drawn when first asked for.

    Plots are imported when they are drawn: that takes a second.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._partition: Figure | None = None

    def partition(self, class_counts: np.ndarray, class_names: Sequence[str]) -> Figure:
        """The run's partition, training samples per client and class [N, K]."""
        from fedprompt.tracking.plots import partition_figure

        if self._partition is None:
            self._partition = partition_figure(np.asarray(class_counts), class_names)
        return self._partition

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``; none where it is missing."""
        path = self._output / "metrics.jsonl"
        return metrics.read(path) if path.exists() else []

    @cached_property
    def pools(self) -> dict[int, np.ndarray]:
        """The saved prompts {round: [P, D]}; none where there are fewer than two in all, of which no map is made."""
        pools = load_pools(self._output / "pools")
        return pools if sum(len(pool) for pool in pools.values()) >= 2 else {}

    @cached_property
    def final(self) -> dict[str, Figure]:
        """The figures at the end, by name."""
        return final_figures(self.records, self.pools)


def final_figures(records: Sequence[dict[str, Any]], pools: Mapping[int, np.ndarray]) -> dict[str, Figure]:
    """Draw ``accuracy`` and, where there are prompts, ``trajectory``."""
    from fedprompt.tracking.plots import accuracy_figure, trajectory_figure

    figures = {"accuracy": accuracy_figure(records)}
    return {**figures, "trajectory": trajectory_figure(pools)} if pools else figures
