"""The figures at the end of a run, drawn from the files in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fedprompt.tracking import metrics
from fedprompt.tracking.plots import accuracy_figure, trajectory_figure
from fedprompt.tracking.pools import load_pools


def final_figures(output: Path) -> dict[str, Figure]:
    """Return the figures ``accuracy`` and, where there are prompts, ``trajectory``."""
    figures = {"accuracy": accuracy_figure(records_of(output))}
    if pools := pools_of(output):
        figures["trajectory"] = trajectory_figure(pools)
    return figures


def records_of(output: Path) -> list[dict[str, Any]]:
    """Return the records of ``metrics.jsonl``; none where it is missing."""
    path = output / "metrics.jsonl"
    return metrics.read(path) if path.exists() else []


def pools_of(output: Path) -> dict[int, np.ndarray]:
    """Return the saved prompts {round: [P, D]}; none where there are fewer than two in all, of which no map is made."""
    pools = load_pools(output / "pools")
    return pools if sum(len(pool) for pool in pools.values()) >= 2 else {}
