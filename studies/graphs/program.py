"""DFedSAM and DFedSAM-MGS against DFedAvg on five graphs, at α = 0.1: accuracy, and how far clients are apart.

Real images and the pretrained backbone, three seeds. To finish in about an hour on two cores, this is smaller than the
demo: 16 clients, 2,000 images, 20 rounds of one local epoch, an evaluation every five rounds, bfloat16. Every method's
rates are the best of six trials on the exponential graph, of half as many rounds and on a seed that is used for nothing
else, judged on the validation split; ρ and Q are the defaults. A round of DFedSAM computes two gradients per step, and
one of MGS sends four times as much: both are in the table, and nobody is given fewer rounds for it.

Runs lie below runs/graphs and are not repeated once they are done. The CSV, a row per run, is written anew whenever one
ends. With --json FILE, CSV and figure are written next to it (results/graphs.json here), else below
runs/graphs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.training import QUICK
from fedprompt.algorithms.decentralized.graphs import GRAPHS
from fedprompt.tracking.plots import BLUE, GREY, ORANGE, STYLE, save
from studies.comparison.contestants import SEEDS, Overrides, grid
from studies.many_runs import SEARCH, Job, chosen, run_stages, sorted_by_names, spread

METHODS = {"dfedavg": GREY, "dfedsam": ORANGE, "dfedsam-mgs": BLUE}
TRIALS = grid(local__lr=(0.01, 0.03, 0.1), local__prompt_lr=(0.05, 0.2))
SEARCHED: Overrides = ("algorithm.graph=exponential", "seed=100", "federation.rounds=10")
FULL: Overrides = (
    *("partition.alpha=0.1", "partition.min_size=8", "data.limit=2000", "federation.clients=16", "local.epochs=1"),
    *("federation.rounds=20", "federation.eval_every=5", "runtime.precision=bfloat16", "runtime.workers=1"),
)
TINY: Overrides = (
    *(*QUICK, "backbone.image_size=32", "prompt.layer=2", "data.limit=200", "federation.clients=5"),
    *("federation.rounds=2", "federation.eval_every=1", "tracking.tensorboard=false"),
)
SCORES = {
    "clients": "mean of the clients' models",
    "averaged_model": "their average",
    "consensus_distance": "consensus distance",
}


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run what is left, print the table, draw it; ``quick`` shows on a tiny backbone and two graphs that it works."""
    root = Path("runs") / ("graphs-quick" if quick else "graphs")
    base = root / "graphs" if json_path is None else json_path.with_suffix("")
    stages = (partial(stage, root, quick) for stage in (_search, _compare))
    done = run_stages(base.with_suffix(".csv"), _table, *stages)
    table = _table([job for job in done if not job.searches])
    summary = _summary(table)
    click.echo(summary.to_string(index=False))
    save(figure(table), base.with_suffix(".png"))
    if json_path is not None:
        rates = {method: list(best) for method, best in chosen(done).items()}
        json_path.write_text(json.dumps({"chosen": rates, "rows": summary.to_dict("records")}, indent=1) + "\n")
    click.echo(f"written: {base.with_suffix('.csv')}, {base.with_suffix('.png')}")


def _search(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    return [
        Job(
            *(root, SEARCH, "exponential", method, 100, trial),
            rest=(f"algorithm.name={method}", *FULL, *SEARCHED, *_small(quick)),
        )
        for method in _methods(quick)
        for trial in TRIALS[: 1 if quick else None]
    ]


def _compare(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    rates = chosen(done)
    return [
        Job(
            *(root, "graphs", graph, method, seed, rates[method]),
            rest=(f"algorithm.name={method}", f"algorithm.graph={graph}", f"seed={seed}", *FULL, *_small(quick)),
        )
        for seed, graph in product(SEEDS[: 1 if quick else None], ("ring", "full") if quick else GRAPHS)
        for method in _methods(quick)
    ]


def _methods(quick: bool) -> list[str]:
    return ["dfedavg", "dfedsam-mgs"] if quick else list(METHODS)


def _small(quick: bool) -> Overrides:
    return TINY if quick else ()


def _table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per run that did not diverge, at its last round; accuracies from 0 to 1, bytes per client and round."""
    rows = []
    for job in (job for job in jobs if not job.failed):
        result = job.result
        clients = len(result["clients"]["accuracies"])
        rows.append(
            {
                "stage": job.stage,
                "graph": job.setting,
                "method": job.method,
                "seed": job.seed,
                "rates": " ".join(job.rates),
                "validation": result["last10"]["validation_accuracy"],
                "clients": result["final"]["accuracy"],
                "averaged_model": result["clients"]["averaged_model_accuracy"],
                "own_data": result["clients"]["mean_accuracy"],
                "consensus_distance": result["consensus_distance"],
                "spectral_gap": result["spectral_gap"],
                "bytes_sent": result["communication"]["up_bytes"] / result["rounds"] / clients,
                "seconds_per_round": result["seconds"]["total"] / result["rounds"],
            }
        )
    return sorted_by_names(pd.DataFrame(rows), ("stage", "graph", "method", "seed"), (*GRAPHS, *METHODS))


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per graph and method: mean ± standard deviation over seeds."""
    rows = []
    for (graph, method), of_method in table.groupby(["graph", "method"], sort=False):
        percent = {name: spread(100 * of_method[name]) for name in ("clients", "averaged_model", "own_data")}
        rows.append(
            {
                "graph": graph,
                "gap": f"{of_method.spectral_gap.mean():.3f}",
                "method": method,
                **percent,
                "consensus": spread(of_method.consensus_distance, ".2f"),
                "MB sent": f"{of_method.bytes_sent.mean() / 1e6:.1f}",
                "s/round": f"{of_method.seconds_per_round.mean():.1f}",
            }
        )
    return pd.DataFrame(rows)


@mpl.rc_context(STYLE)
def figure(table: pd.DataFrame) -> Figure:
    """Draw both accuracies and the consensus distance over the graphs: a line per method, every seed a dot."""
    graphs = table.groupby("graph").spectral_gap.mean().sort_values()
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, (column, title) in zip(drawn.subplots(1, len(SCORES)), SCORES.items()):
        scale = 1 if column == "consensus_distance" else 100
        for method, colour in METHODS.items():
            runs = table[table.method == method]
            if runs.empty:
                continue
            means = runs.groupby("graph")[column].mean().reindex(graphs.index)
            axes.plot(range(len(graphs)), scale * means.to_numpy(), color=colour, linewidth=1.6, label=method)
            places = [graphs.index.get_loc(graph) for graph in runs.graph]
            axes.plot(places, scale * runs[column].to_numpy(), "o", color=colour, markersize=3.5, alpha=0.6)
        axes.set_title(title)
        axes.set_xticks(np.arange(len(graphs)), [f"{name}\n{gap:.2f}" for name, gap in graphs.items()], fontsize=7.5)
        axes.grid(True)
        if scale == 100:
            axes.set_ylabel("test accuracy (%)")
    drawn.axes[0].legend(frameon=False)
    drawn.supxlabel("graph and its spectral gap", fontsize=9)
    return drawn
