"""Ways to do the same, measured in turn in one run: what disturbs the machine for a while disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any


def in_turn(
    ways: dict[str, Callable[[], Any]], turns: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every turn and the last result of each way, after one turn that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            begun = clock()
            results[name] = way()
            if turn:
                times[name].append(clock() - begun)
    return times, results


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over turns of the ratio within a turn."""
    return median(s / f for s, f in zip(slow, fast, strict=True))
