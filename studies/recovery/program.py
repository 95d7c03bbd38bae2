"""When does generative set aggregation recover a known correspondence? Planted prompts, copied with noise and shuffled.

Every client holds a noisy copy of the same planted prompts in an order of its own. Two prompts of different clients
correspond if they are copies of the same planted prompt. The aggregation says that they do by matching both to one
candidate, so it is scored on pairs of prompts of different clients:

    recall     share of the corresponding pairs that got the same candidate
    precision  share of the pairs with the same candidate that correspond

A pool as large as all local prompts together has merged nothing (recall 0, no precision); the planted number of prompts
is the right size. Scale is the RMS of a planted coordinate, noise is relative to it. The method ``pfpt-map`` matches to
a pool that was sent, and here none was: it gets the clients' mean slot by slot, in which all orders are mixed.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from fedprompt.algorithms.pfpt.generative_model import Prior
from fedprompt.algorithms.pfpt.map_aggregation import MapOptions, aggregate_around
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, Schedule, SetAggregation, aggregate_sets

SCALES = (0.03, 0.1, 1.0)
NOISES = (0.01, 0.1, 0.33)


@dataclass(frozen=True)
class Planted:
    """A problem with a known answer."""

    clients: int = 10
    prompts: int = 20
    width: int = 768
    scale: float = 0.03
    noise: float = 0.1  # relative to scale

    def draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
        """Return the clients' sets [C, n, D] and which planted prompt each of their prompts is a copy of [C, n]."""
        planted = self.scale * rng.standard_normal((self.prompts, self.width))
        origin = np.stack([rng.permutation(self.prompts) for _ in range(self.clients)])
        noise = self.noise * self.scale * rng.standard_normal((self.clients, self.prompts, self.width))
        return torch.from_numpy((planted[origin] + noise).astype(np.float32)), origin


def pair_agreement(assignment: np.ndarray, origin: np.ndarray) -> tuple[float, float]:
    """Return recall and precision over pairs of prompts of different clients; precision is NaN if no pair was merged.

    ``assignment`` and ``origin`` are [C, n]; neither repeats a value within a client, except -1 (dropped, merged with
    nothing) in ``assignment``.
    """
    kept = assignment.ravel() >= 0
    merged = _pairs(assignment.ravel()[kept])
    both = _pairs(np.stack([assignment.ravel()[kept], origin.ravel()[kept]]))
    return both / _pairs(origin.ravel()), both / merged if merged else float("nan")


def _pairs(labels: np.ndarray) -> int:
    """Return the number of pairs of equal columns."""
    count = np.unique(labels, axis=-1, return_counts=True)[1]
    return int((count * (count - 1) // 2).sum())


def aggregate(sets: torch.Tensor, settings: GenerativeSettings | MapOptions, seed: int) -> SetAggregation:
    """Run the method that the settings are for."""
    if isinstance(settings, MapOptions):
        return aggregate_around(sets.mean(0), sets, [1] * len(sets), settings)
    return aggregate_sets(sets, settings, np.random.default_rng([seed, 1]))


def measure(problem: Planted, settings: GenerativeSettings | MapOptions, seeds: int) -> dict[str, object]:
    """Return the mean scores of ``seeds`` draws of a problem, with the settings that they belong to."""
    rows = []
    for seed in range(seeds):
        sets, origin = problem.draw(np.random.default_rng([seed, 0]))
        begun = time.perf_counter()
        result = aggregate(sets, settings, seed)
        seconds = time.perf_counter() - begun
        recall, precision = pair_agreement(result.assignment.numpy(), origin)
        rows.append({"recall": recall, "precision": precision, "seconds": seconds, **result.metrics})
    means = {key: _mean([row[key] for row in rows]) for key in rows[0]}
    method = "pfpt-map" if isinstance(settings, MapOptions) else "pfpt"
    return {"method": method, **asdict(problem), **asdict(settings), "seeds": seeds, **means}


def _mean(values: list[float]) -> float | None:
    """Return the mean of the values that are defined; None, which JSON knows, if there are none."""
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else None


_COLUMNS = {  # heading: (key, format)
    "scale": ("scale", "{:.2f}"),
    "noise": ("noise", "{:.0%}"),
    "method": ("method", "{}"),
    "schedule": ("schedule", "{}"),
    "prior": ("prior", "{}"),
    "sweeps": ("sweeps", "{:.0f}"),
    "recall": ("recall", "{:.3f}"),
    "precision": ("precision", "{:.3f}"),
    "pool": ("pool_size", "{:.1f}"),
    "drift/rms": ("drift_relative", "{:.3f}"),
    "changed": ("changed", "{:.1%}"),
    "width": ("width", "{}"),
    "seconds": ("seconds", "{:.2f}"),
}


def _line(row: dict[str, object]) -> str:
    cells = ("-" if row.get(key) is None else style.format(row[key]) for key, style in _COLUMNS.values())
    return "  ".join(f"{cell:>10}" for cell in cells)


def main(json_path: Path | None, quick: bool = False, sweeps: Sequence[int] = (50,)) -> None:
    """Print recall, precision and pool size over scales, noises and methods; write them to ``json_path``.

    The full run takes a few minutes on one core: 10 clients with 20 prompts of width 768, three draws of each problem,
    for every number of ``sweeps``, and at last one of width 384 for its timing. ``quick`` is a small problem with few
    sweeps that shows only that everything works.
    """
    shape = {"clients": 4, "prompts": 5, "width": 32} if quick else {}
    counts = (3,) if quick else tuple(sweeps)
    methods: list[GenerativeSettings | MapOptions] = [
        GenerativeSettings(schedule=schedule, prior=prior, sweeps=count)
        for count, schedule, prior in itertools.product(counts, get_args(Schedule), get_args(Prior))
    ]
    methods.append(MapOptions())
    problems = [Planted(**shape, scale=scale, noise=noise) for scale in SCALES for noise in NOISES]
    if not quick:
        problems.append(Planted(width=384))
    _warm_up()
    first = problems[0]
    print(f"{first.clients} clients x {first.prompts} prompts, {torch.get_num_threads()} thread(s)")
    print("  ".join(f"{heading:>10}" for heading in _COLUMNS))
    rows = []
    for problem in problems:
        for settings in methods:
            rows.append(measure(problem, settings, seeds=1 if quick else 3))
            print(_line(rows[-1]), flush=True)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


def _warm_up() -> None:
    """Let the first call's lazy imports happen outside the timed ones."""
    sets, _ = Planted(clients=2, prompts=2, width=4).draw(np.random.default_rng(0))
    for settings in (GenerativeSettings(sweeps=1), MapOptions()):
        aggregate(sets, settings, seed=0)
