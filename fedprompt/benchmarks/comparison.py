"""PFPT and the reference points on the same data, partition and budget: a learning-rate search, then three seeds.

Everything but the method and its learning rates is the configuration's default, so the PFPT rows are what `fedprompt
run` itself does. Every method gets the same number of trials on a seed that is used for nothing else, judged by the
mean of the last ten evaluations on the validation split, with fewer rounds and in bfloat16 to save time.

Runs lie below runs/comparison and are not repeated once they are done; one process per core, one thread each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, save

METHODS = {
    "pfpt": ["algorithm.name=pfpt"],
    "fedavg": ["algorithm.name=fedavg"],
    "fedavg, pool": ["algorithm.name=fedavg", "prompt.kind=pool"],
    "frozen": ["algorithm.name=frozen"],
    "head": ["algorithm.name=head"],
}
SEEDS = (0, 1, 2)
SEARCH_SEED, SEARCH_ROUNDS = 100, 12
RATES = [(lr, prompt_lr) for prompt_lr in (1e-4, 1e-3, 3e-3) for lr in (2.5e-4, 5e-4, 1e-3)]
# As many trials where no prompt is tuned.
HEAD_RATES = [(lr, None) for lr in (3e-5, 6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]

Rates = tuple[float, float | None]


def main(json_path: Path | None, quick: bool = False) -> None:
    """Search, run, print the table; ``quick`` shows that it works, on few images and rounds."""
    root = Path("runs") / ("comparison-quick" if quick else "comparison")
    small = ["data.limit=600", "federation.rounds=2"] if quick else []
    chosen = _search(root, small, RATES[:2] if quick else None)
    jobs = {
        (method, seed): (
            root / f"{_slug(method)}-{seed}",
            [*METHODS[method], *_rate_keys(chosen[method]["rates"]), f"seed={seed}", *small],
        )
        for method in METHODS
        for seed in (SEEDS[:1] if quick else SEEDS)
    }
    outcomes = {key: _outcome(jobs[key][0]) for key in _run_all(jobs)}
    rows = [
        _row(method, chosen[method], [o for (m, _), o in sorted(outcomes.items()) if m == method]) for method in METHODS
    ]
    click.echo(pd.DataFrame([{k: v for k, v in row.items() if k != "runs"} for row in rows]).to_string(index=False))
    for row in rows:
        for seed, run in zip(SEEDS, row["runs"], strict=False):
            if run["pool_sizes"]:
                click.echo(f"{row['method']}, seed {seed}, pool size per round: {run['pool_sizes']}")
    save(_figure(rows), root / "comparison.png")
    click.echo(f"written: {root / 'comparison.png'}")
    if json_path is not None:
        json_path.write_text(json.dumps({"rows": rows, "search": chosen}, indent=1) + "\n")


def _search(root: Path, small: Sequence[str], only: Sequence[Rates] | None) -> dict[str, dict[str, Any]]:
    """Best rates of every method on the validation split of the search seed."""
    shared = [f"seed={SEARCH_SEED}", f"federation.rounds={SEARCH_ROUNDS}", "runtime.precision=bfloat16", *small]
    jobs = {
        (method, rates): (
            root / "search" / f"{_slug(method)}-{rates[0]:g}-{rates[1] or 0:g}",
            [*METHODS[method], *_rate_keys(rates), *shared],
        )
        for method in METHODS
        for rates in only or (HEAD_RATES if method in ("frozen", "head") else RATES)
    }
    found: dict[str, list[tuple[float, Rates]]] = {}
    for method, rates in _run_all(jobs):
        accuracy = json.loads((jobs[method, rates][0] / "result.json").read_text())["last10"]["validation_accuracy"]
        found.setdefault(method, []).append((accuracy, rates))
        click.echo(f"search {method}: lr {rates[0]:g}, prompt_lr {rates[1] or rates[0]:g}: validation {accuracy:.4f}")
    best = {method: max(trials, key=lambda trial: trial[0]) for method, trials in found.items()}
    return {
        method: {"rates": rates, "validation": accuracy, "trials": sorted(found[method], key=lambda t: -t[0])}
        for method, (accuracy, rates) in best.items()
    }


def _run_all(jobs: dict[Any, tuple[Path, list[str]]]) -> Iterator[Any]:
    """Run every job whose result is not there yet; yields keys as jobs are done."""
    todo = {key: job for key, job in jobs.items() if not (job[0] / "result.json").exists()}
    yield from (key for key in jobs if key not in todo)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as processes:
        futures = {processes.submit(_run, *job): key for key, job in todo.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _run(output: Path, overrides: list[str]) -> None:
    """One run in this process, on one thread."""
    from fedprompt.config import load
    from fedprompt.runtime.run import new_run, run_in_process

    config = load(None, [*overrides, "runtime.workers=1"])
    with new_run(output, config, overwrite=True):
        for _ in run_in_process(config, output):
            pass


def _outcome(output: Path) -> dict[str, Any]:
    result = json.loads((output / "result.json").read_text())
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    pools = [int(r["aggregate"]["pool_size"]) for r in records if "pool_size" in r.get("aggregate", {})]
    scores = {name: result[name]["accuracy"] for name in ("best", "final", "last10")}
    sent = result["communication"]["up_bytes"] + result["communication"]["down_bytes"]
    curve = [record["test"]["accuracy"] for record in records]
    return {**scores, "MB": sent / 1e6, "seconds": result["seconds"]["total"], "pool_sizes": pools, "curve": curve}


def _row(method: str, chosen: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    def spread(name: str) -> str:
        values = [100 * run[name] for run in runs]
        mean = f"{np.mean(values):.1f}"
        return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean

    lr, prompt_lr = chosen["rates"]
    return {
        "method": method,
        "lr": lr,
        "prompt_lr": prompt_lr if prompt_lr is not None else "-",
        **{f"{name} %": spread(name) for name in ("best", "final", "last10")},
        "MB sent": round(float(np.mean([run["MB"] for run in runs])), 1),
        "runs": runs,
    }


@mpl.rc_context(STYLE)
def _figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Test accuracy over the rounds: every method's mean over the seeds, and a band of one standard deviation."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row, colour in zip(rows, (BLUE, ORANGE, GREEN, PURPLE, GREY), strict=True):
        curves = 100 * np.array([run["curve"] for run in row["runs"]])  # [seeds, rounds + 1]
        mean, spread, rounds = curves.mean(0), curves.std(0), np.arange(curves.shape[1])
        axes.plot(rounds, mean, color=colour, label=row["method"])
        axes.fill_between(rounds, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("communication round")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rows), frameon=False, borderaxespad=0.2)
    return figure


def _rate_keys(rates: Rates) -> list[str]:
    lr, prompt_lr = rates
    return [f"local.lr={lr}"] + ([] if prompt_lr is None else [f"local.prompt_lr={prompt_lr}"])


def _slug(method: str) -> str:
    return method.replace(", ", "-")
