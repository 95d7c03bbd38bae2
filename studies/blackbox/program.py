"""Fed-BBPT's accuracy over queries, against zero-shot, local, centralized and white-box tuning of the same generator.

The embedded data and the real backbone, 20 clients of which 5 take part in a round, α = 0.5, three seeds. Every method
trains the same generator of visual prompts (6,083 parameters), scored by the same class prototypes of 8 public images
per class. *zero-shot* is round 0 of every run: the service before anything is tuned. *white box* is FedAvg with Adam,
which has the backbone at every client; what it is drawn over are the images that went through the backbone in training,
so a step costs half of SPSA's.

Every method's gains or rate are the best of six trials, half as long, on a seed that is used for nothing else,
judged on validation data; *default gains* are the configuration's, which were not searched. A round of *centralized*
has as many steps as a cohort.

What was cut so that two cores finish in about an hour: 16 rounds of one epoch, and an evaluation every fourth round.
Local models are scored on a subsample of 200 images each. It is float32 throughout: in bfloat16 the differences that
SPSA lives on drown in rounding.

Runs lie below runs/blackbox and are not repeated once they are done; one process per core, one thread each. The CSV has
a row per run and evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedprompt.tracking import metrics
from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, save
from studies.comparison.contestants import Overrides, grid
from studies.many_runs import SEARCH, Job, chosen, run_stages, spread

SEEDS = (0, 1, 2)
SHARED = (
    *("partition.alpha=0.5", "prompt.kind=visual", "local.epochs=1", "runtime.workers=1"),
    *("runtime.precision=float32", "tracking.tensorboard=false"),
)
EVERY, FULL, SEARCHED = 4, 16, 8  # rounds
QUICK = (
    *("backbone.name=test_vit", "backbone.weights=random", "backbone.image_size=32", "data.name=digits"),
    *("data.limit=500", "federation.clients=6", "federation.cohort=3", "partition.min_size=8"),
    *("federation.rounds=2", "federation.eval_every=1"),
)
GAINS = grid(local__prompt_lr=(2.5e-4, 5e-4, 1e-3), blackbox__c=(0.01, 0.04))
RATES = grid(local__prompt_lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1))

# name: (what makes the method, its trials)
METHODS: dict[str, tuple[Overrides, tuple[Overrides, ...]]] = {
    "Fed-BBPT": (("algorithm.name=fedbbpt",), GAINS),
    "Fed-BBPT, default gains": (("algorithm.name=fedbbpt",), ((),)),
    "local": (("algorithm.name=local", "local.optimizer=spsa-gc"), GAINS),
    "centralized": (("algorithm.name=centralized", "local.optimizer=spsa-gc"), GAINS),
    "white box": (("algorithm.name=fedavg", "local.optimizer=adam"), RATES),
}
COLOURS = dict(zip(METHODS, (BLUE, SKY, GREEN, ORANGE, PURPLE), strict=True))
ZERO_SHOT = "zero-shot"


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run what is missing, print the table; ``quick`` shows that it works, on a tiny backbone."""
    root = Path("runs") / ("blackbox-quick" if quick else "blackbox")
    csv = root / "blackbox.csv" if json_path is None else json_path.with_suffix(".csv")
    done = run_stages(csv, _table, *(partial(stage, root, quick) for stage in (_search, _compare)))
    table = _table([job for job in done if not job.searches])
    summary = _summary(table)
    click.echo(summary.to_string(index=False))
    save(_figure(table), csv.with_suffix(".png"))
    click.echo(f"written: {csv}, {csv.with_suffix('.png')}")
    if json_path is not None:
        rates = {method: list(best) for method, best in chosen(done).items()}
        json_path.write_text(json.dumps({"chosen": rates, "rows": summary.to_dict("records")}, indent=1) + "\n")


def _search(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    return [
        Job(root, SEARCH, "alpha 0.5", method, 100, trial, (*makes, *_rest(SEARCHED, quick), "seed=100"))
        for method, (makes, trials) in METHODS.items()
        for trial in (trials[: 1 if quick else None] if len(trials) > 1 else ())
    ]


def _compare(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    rates = chosen(done)
    return [
        Job(
            *(root, "run", "alpha 0.5", method, seed, rates[method] if len(trials) > 1 else trials[0]),
            rest=(*makes, *_rest(FULL, quick), f"seed={seed}"),
        )
        for seed in SEEDS[: 1 if quick else None]
        for method, (makes, trials) in METHODS.items()
    ]


def _rest(rounds: int, quick: bool) -> Overrides:
    """What all have in common."""
    return (*SHARED, f"federation.rounds={rounds}", f"federation.eval_every={EVERY}", *(QUICK if quick else ()))


def _table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per run and evaluation: queries of training so far (of the white box: images), accuracies from 0 to 1."""
    rows = []
    for job in (job for job in jobs if not job.failed):
        asked = 0
        for record in metrics.read(job.folder / "metrics.jsonl"):
            asked += 0 if "queries" in record else int(_sizes(job.overrides)[record.get("cohort", [])].sum())
            if "test" in record:
                rows.append(
                    {
                        **{name: getattr(job, name) for name in ("stage", "method", "seed")},
                        "rates": " ".join(job.rates),
                        "round": record["round"],
                        "queries": record["queries"]["train"] if "queries" in record else asked,
                        **{split: record[split]["accuracy"] for split in ("validation", "test")},
                        "clients": record["clients"]["mean_accuracy"],
                    }
                )
    return pd.DataFrame(rows)


@cache
def _sizes(overrides: tuple[str, ...]) -> np.ndarray:
    """Images [clients] that a client's epoch passes over: what the white box asks of its own backbone."""
    from fedprompt.config.parsing import load
    from fedprompt.runtime.build import build_data

    return build_data(load(None, list(overrides))).sizes


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per method, mean ± standard deviation over seeds in percent; gains are over the run's own round 0.

    Local models are scored on a subsample, so that their round 0 is not that of the others.
    """
    runs_of = table.groupby(["method", "seed"])
    last, first = runs_of.tail(1), runs_of.head(1).set_index(["method", "seed"]).test
    parts = [(ZERO_SHOT, _zero_shot(table)), *((method, last[last.method == method]) for method in METHODS)]
    return pd.DataFrame(
        {
            "method": method,
            "queries": int(runs.queries.mean()),
            "test": spread(100 * runs.test),
            "gain": spread(100 * (runs.set_index(["method", "seed"]).test - first).dropna()),
            "own clients": spread(100 * runs.clients),
        }
        for method, runs in parts
    )


def _zero_shot(table: pd.DataFrame) -> pd.DataFrame:
    """Round 0 of a method that is scored on the whole test set."""
    return table[(table["round"] == 0) & (table.method == next(iter(METHODS)))]


@mpl.rc_context(STYLE)
def _figure(table: pd.DataFrame) -> Figure:
    """Test accuracy over queries: every seed a thin line, the mean a thick one."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method, colour in COLOURS.items():
        runs = table[table.method == method]
        for _, run in runs.groupby("seed"):
            axes.plot(run.queries, 100 * run.test, color=colour, linewidth=0.7, alpha=0.5)
        mean = runs.groupby("round")[["queries", "test"]].mean()
        axes.plot(mean.queries, 100 * mean.test, color=colour, marker="o", markersize=4, linewidth=2, label=method)
    axes.axhline(100 * _zero_shot(table).test.mean(), color=GREY, linestyle="--", label=ZERO_SHOT)
    axes.set_xlabel("queries in training (white box: images)")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(True)
    axes.legend(frameon=False)
    return figure
