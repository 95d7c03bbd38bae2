"""Where should prompts enter? Time per step for prompts before block 0, 6, 8 or 10, and accuracy in a fixed time.

The tokens before the prompts' block are computed once per image and kept. The first table tells what a step of a group
of three clients then costs, measured in turn on one thread. The curves are PFPT's on the embedded data, run in this
process, over the time spent on training and aggregation; that contains what is computed once per image, when a client
first takes part, and leaves out evaluations. All times are seconds of processor time, added up over cores: other
programs on the machine disturb those less than the time that passes. With --json the figure is written next to it.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.training import CLIENTS, QUICK, Group
from benchmarks.turns import in_turn, ratio
from fedprompt.config import parsing as config
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, save

LAYERS, QUICK_LAYERS = (0, 6, 8, 10), (0, 2)
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
SECONDS, QUICK_SECONDS = 20.0, 1.0  # of training and aggregation, per run
STEPS = 2  # per client and turn of the first table
FULL = ("data.limit=3000", "partition.alpha=1", "local.epochs=1", "local.lr=2e-3", "local.prompt_lr=5e-3")
TINY = (*QUICK, "backbone.image_size=32", "data.limit=200", "federation.clients=4", "federation.cohort=2")
RUN = ("federation.rounds=10000", "runtime.checkpoint_every=10000", "tracking.tensorboard=false")

Curve = list[dict[str, float]]  # evaluations of one run: seconds, round, test and validation accuracy


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print both tables and draw the curves; takes about ten minutes. ``quick`` shows on a tiny ViT that it works."""
    layers, seeds = (QUICK_LAYERS, QUICK_SEEDS) if quick else (LAYERS, SEEDS)
    budget, overrides = (QUICK_SECONDS, TINY) if quick else (SECONDS, FULL)
    steps = _steps(layers, QUICK if quick else (), quick)
    click.echo(f"accuracy after {budget:g} s of processor time in training and aggregation, seeds {list(seeds)}")
    curves: dict[int, list[Curve]] = {layer: [] for layer in layers}
    for seed in seeds:  # the layers in turn, so that a machine that is busy for a while disturbs all of them
        for layer in layers:
            curves[layer].append(_curve(layer, seed, budget, overrides))
    ends = {layer: _end(runs, budget) for layer, runs in curves.items()}
    for layer, end in ends.items():
        click.echo(
            f"  layer {layer:>2}: test {end['test']:.1%} ({min(end['tests']):.1%} to {max(end['tests']):.1%}), "
            f"validation {end['validation']:.1%}, {end['rounds']:.0f} rounds"
        )
    if json_path is not None:
        rows = [{"layer": layer, **steps[layer], **ends[layer], "curves": curves[layer]} for layer in layers]
        json_path.write_text(json.dumps({"budget_seconds": budget, "layers": rows}, indent=1) + "\n")
        picture = json_path.with_suffix(".png")
        save(figure(curves, budget), picture)
        click.echo(f"written: {json_path}, {picture}")


def _steps(layers: Sequence[int], overrides: Sequence[str], quick: bool) -> dict[int, dict[str, float]]:
    size = () if not quick else ("backbone.image_size=32",)
    images = STEPS * 16
    groups = {str(layer): Group(images, f"prompt.layer={layer}", *size, *overrides) for layer in layers}
    times, _ = in_turn({name: group.train for name, group in groups.items()}, 1 if quick else 7, time.process_time)
    click.echo(f"time per step of {CLIENTS} clients with 16 images each, one thread")
    found = {}
    for layer in layers:
        own, first = times[str(layer)], times[str(layers[0])]
        found[layer] = {"step_seconds": median(own) / STEPS, "times_as_fast": ratio(first, own)}
        click.echo(
            f"  layer {layer:>2}:{1e3 * found[layer]['step_seconds']:>8.1f} ms, {found[layer]['times_as_fast']:.2f} "
            f"times as fast as layer {layers[0]}"
        )
    return found


def _curve(layer: int, seed: int, budget: float, overrides: Sequence[str]) -> Curve:
    """Evaluations of one run until the budget is used up; the last one is of the round that used it up.

    A round's processor time falls to its stages as the time that passed in them.
    """
    settings = config.load(None, [*RUN, *overrides, f"prompt.layer={layer}", f"seed={seed}"])
    points, spent = [], 0.0
    with tempfile.TemporaryDirectory() as folder, closing(run_in_process(settings, Path(folder))) as records:
        begun = time.process_time()
        for record in records:
            now, stages = time.process_time(), record["seconds"]
            if record["round"] > 0:
                spent += (now - begun) * (stages["train"] + stages["aggregate"]) / stages["total"]
            begun = now
            accuracies = {split: record[split]["accuracy"] for split in ("test", "validation")}
            points.append({"seconds": spent, "round": record["round"], **accuracies})
            if spent >= budget:
                break
    return points


def at(curve: Curve, key: str, seconds: np.ndarray) -> np.ndarray:
    """What the last evaluation by each of the given seconds [n] says of ``key``."""
    reached = np.searchsorted([point["seconds"] for point in curve], seconds, side="right") - 1
    return np.array([point[key] for point in curve])[reached]


def _end(runs: Sequence[Curve], budget: float) -> dict[str, Any]:
    """What the seeds reached within the budget: a round that ended after it does not count."""
    ends = {key: [float(at(run, key, np.array(budget))) for run in runs] for key in ("test", "validation", "round")}
    return {
        "test": mean(ends["test"]),
        "tests": ends["test"],
        "validation": mean(ends["validation"]),
        "rounds": mean(ends["round"]),
    }


@mpl.rc_context(STYLE)
def figure(curves: dict[int, list[Curve]], budget: float) -> Figure:
    """Draw test accuracy over seconds of training and aggregation: the seeds' mean, and the range between them."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots()
    seconds = np.linspace(0, budget, 400)
    for (layer, runs), colour in zip(curves.items(), (GREY, ORANGE, GREEN, BLUE, PURPLE)):
        values = 100 * np.stack([at(run, "test", seconds) for run in runs])  # [seeds, n]
        axes.plot(seconds, values.mean(0), color=colour, linewidth=1.6, label=f"block {layer}")
        axes.fill_between(seconds, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("processor time of training and aggregation (s)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(True)
    axes.legend(title="prompts before", loc="upper left", frameon=False)
    return drawn
