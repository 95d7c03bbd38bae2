"""Personalization against robustness after federated training with SGD clients and with Adam clients (Profit).

FedAvg on prompts at α = 0.1 on three seeds, on the comparison's data, clients, rounds and rates for it; then every
client tunes its prompts for ten epochs at a small and a large learning rate, and the models after every epoch, those
half the way to them, and their means over epochs are scored on the client's own test data and on everybody's.

Cut to about an hour on two cores: 20 rounds, bfloat16, one level of heterogeneity, two personal learning rates, no
FedSGD and no server optimizer; tune_configs/profit.yaml has all of these. Runs lie below runs/profit and are not
repeated once they are done, nor is a learning rate. Table and figure are next to the JSON file where one is asked for.
One process per core, one thread each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pandas as pd

from fedprompt.personalization import trade_off
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.plots import save
from studies.many_runs import one_per_core, run_all, run_in_folder, spread

Overrides = tuple[str, ...]
SEEDS = (0, 1, 2)
CLIENTS: dict[str, Overrides] = {
    "Adam clients": ("local.optimizer=adam", "local.lr=1e-3", "local.prompt_lr=1e-2"),
    "SGD clients": ("local.optimizer=sgd", "local.lr=0.03", "local.prompt_lr=0.05"),
}
SHARED: Overrides = (
    *("algorithm.name=fedavg", "partition.alpha=0.1", "federation.rounds=20", "federation.eval_every=10"),
    *("runtime.precision=bfloat16", "runtime.workers=1", "tracking.tensorboard=false"),
)
PERSONAL: dict[str, Any] = {"lr": [1e-3, 1e-2], "epochs": 10, "interpolation": [0.25, 0.5, 0.75], "averaging": True}
QUICK: Overrides = (
    *("backbone.name=test_vit", "backbone.weights=random", "backbone.image_size=32", "prompt.layer=2"),
    *("data.name=digits", "data.limit=500", "partition.min_size=4", "federation.clients=4", "federation.cohort=2"),
    *("federation.rounds=2", "federation.eval_every=1", "runtime.precision=float32"),
)
KINDS = {"start": "start", "most_personal": "most personal", "balanced": "balance", "interpolated": "interpolated"}


@dataclass(frozen=True)
class Job:
    """One federated run and its clients' personalization."""

    folder: Path
    clients: str
    seed: int
    overrides: Overrides
    personal: dict[str, Any]


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run, personalize, print and draw the curves; ``quick`` shows that it works, on a tiny backbone."""
    root = Path("runs") / ("profit-quick" if quick else "profit")
    csv = root / "profit.csv" if json_path is None else json_path.with_suffix(".csv")
    jobs, done = _jobs(root, quick), []
    with one_per_core() as processes:
        for job in run_all(processes, jobs, lambda job: _result(job).exists(), _run):
            done.append(job)
            csv.parent.mkdir(parents=True, exist_ok=True)
            ordered = [other for other in jobs if other in done]
            write_atomic(csv, _table(ordered).to_csv(index=False, float_format="%.6g").encode())
            click.echo(f"{job.clients}, seed {job.seed}: {_told(job)}")
    table = _table(jobs)
    summary = _summary(table)
    click.echo(summary.to_string(index=False))
    save(trade_off.figure(_mean_curves(table)), csv.with_suffix(".png"))
    click.echo(f"written: {csv}, {csv.with_suffix('.png')}")
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": summary.to_dict("records")}, indent=1) + "\n")


def _jobs(root: Path, quick: bool) -> list[Job]:
    personal = {**PERSONAL, "epochs": 2, "clients": 2} if quick else PERSONAL
    return [
        Job(
            root / f"{name.split()[0].lower()}-seed{seed}",
            name,
            seed,
            (*SHARED, *makes, f"seed={seed}", *(QUICK if quick else ())),
            personal,
        )
        for seed in SEEDS[: 2 if quick else None]
        for name, makes in CLIENTS.items()
    ]


def _run(job: Job) -> None:
    """One run and its personalization in this process, on one thread; what is done of either is not done again."""
    from fedprompt.config.parsing import load
    from fedprompt.personalization.personalize import after_run, personalize, settings_of
    from fedprompt.runtime.build import divided_data
    from fedprompt.runtime.pool import InProcessPool

    if not (job.folder / "result.json").exists():
        run_in_folder(job.folder, job.overrides)
    config = load(None, list(job.overrides))
    data = divided_data(config)
    with closing(InProcessPool(config, data)) as pool:
        personalize(after_run(job.folder, config, settings_of(job.personal)), data, pool, say=lambda line: None)


def _result(job: Job) -> Path:
    return job.folder / "personalize" / "result.json"


def _told(job: Job) -> str:
    """Accuracies on own / on everybody's data."""
    result = json.loads(_result(job).read_text())
    points = {words: result[kind] for kind, words in KINDS.items()}
    return "; ".join(
        f"{words} {p['personal_accuracy']:.3f} / {p['robust_accuracy']:.3f}" for words, p in points.items()
    )


def _table(jobs: Sequence[Job]) -> pd.DataFrame:
    """The curves of all jobs: a row per clients' optimizer, seed and model, means over clients."""
    curves = []
    for job in jobs:
        curve = pd.read_csv(
            job.folder / "personalize" / "curve.csv", converters={"lr": float}, float_precision="round_trip"
        )
        curve.insert(0, "optimizer", job.clients)
        curve.insert(1, "seed", job.seed)
        curves.append(curve)
    return pd.concat(curves)


def _mean_curves(table: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """A curve per clients' optimizer, mean over seeds."""
    return {
        f"FedAvg, {name}": rows.groupby(trade_off.MODEL, sort=False)[trade_off.ACCURACIES].mean().reset_index()
        for name, rows in table.groupby("optimizer", sort=False)
    }


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per clients' optimizer and learning rate: own / everybody's, in percent, mean ± deviation over seeds."""
    rows = []
    for (name, lr), of_rate in table.groupby(["optimizer", "lr"], sort=False):
        by_seed = [trade_off.summary(points) for _, points in of_rate.groupby("seed")]
        best = {words: [summary[kind] for summary in by_seed] for kind, words in KINDS.items()}
        rows.append({"clients": name, "personal lr": lr, **{words: _both(points) for words, points in best.items()}})
    return pd.DataFrame(rows)


def _both(points: Sequence[Mapping[str, float]]) -> str:
    return " / ".join(spread([100 * point[name] for point in points]) for name in trade_off.ACCURACIES)
