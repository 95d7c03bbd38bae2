"""What the ablations show a reader, made of their table of runs (results/ablations.csv): three tables, a figure.

Accuracies in that table are from 0 to 1, here they are in percent.
"""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from fedprompt.reports.tables import MISSING, Table, p_value
from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE
from studies.comparison.contestants import SKEW
from studies.comparison.tables import difference
from studies.many_runs import spread

BASE, FIRST = "pfpt", "alpha 0.1"
OF_DATA = ("alpha", "share of the dominant class", "long tail's factor", "data sets", "data sets, alpha 5")
GROWING = {  # whose pools are drawn, in which colour
    BASE: BLUE,
    "no prior": ORANGE,
    "joint schedule": PURPLE,
    "5 sweeps": GREEN,
    "similarity term subtracted": GREY,
}


def tables(table: pd.DataFrame) -> dict[str, Table]:
    """All tables for which there are runs, by their titles."""
    made = {f"Changed in one place, at {FIRST}": ablations(table)}
    if table.setting[table.setting.isin(SKEW)].nunique() > 1:
        made["The telling ones under other skew (%)"] = telling(table)
    if not table.setting.isin(SKEW).all():
        made["What the pool's size depends on (one seed)"] = sensitivities(table)
    if table.setting.isin(OF_DATA).any():
        made["Does it depend on the data? Rank correlations of the pool's size"] = correlations(table)
    return made


def ablations(table: pd.DataFrame) -> Table:
    """A row per change: accuracy, the difference to PFPT paired over seeds with its p, and what the pool did."""
    runs = table[table.setting == FIRST]
    by_seed = runs.pivot(index="seed", columns="method", values="last10")
    rows = []
    for name, of_name in runs.groupby("method", sort=False):
        points, _, p = (MISSING,) * 3 if name == BASE else difference(by_seed[name], by_seed[BASE])
        own = spread(100 * of_name.own_head) if of_name.own_head.notna().all() else MISSING
        rows.append([name, spread(100 * of_name.last10), points, p, own, *_pool(of_name)])
    return Table(["change", "test, last ten", "against pfpt", "p", "own heads", "prompts", "moved", "drift"], rows)


def telling(table: pd.DataFrame) -> Table:
    """A row per change that was run under all kinds of skew: mean ± standard deviation over seeds."""
    present = [skew for skew in SKEW if (table.setting == skew).any()]
    runs = table[table.setting.isin(present)]
    everywhere = runs.groupby("method", sort=False).setting.nunique()
    rows = [
        [name, *(spread(100 * runs[(runs.method == name) & (runs.setting == skew)].last10) for skew in present)]
        for name in everywhere[everywhere == len(present)].index
    ]
    return Table(["change", *present], rows)


def sensitivities(table: pd.DataFrame) -> Table:
    """A row per value that was tried: accuracy, the pool at the end, and how far apart clients are."""
    runs = table[~table.setting.isin(SKEW)]
    base = table[(table.setting == FIRST) & (table.method == BASE) & (table.seed == 0)]
    rows = [
        [
            run.setting,
            run.method,
            f"{100 * run.last10:.1f}",
            *_pool(pd.DataFrame([run])),
            f"{run.labels_apart:.2f}",
            f"{run.features_apart:.2f}",
        ]
        for run in pd.concat([base, runs]).itertuples()
    ]
    return Table(
        ["what", "value", "test, last ten", "prompts", "moved", "drift", "labels apart", "features apart"], rows
    )


def correlations(table: pd.DataFrame) -> Table:
    """A row per measure: Spearman's correlation with the pool's size, over PFPT's runs that differ in their data alone.

    Those of the ablations' first table and the sensitivities together, one seed.
    """
    base = (table.setting == FIRST) & (table.method == BASE)
    runs = table[(base | table.setting.isin(OF_DATA)) & (table.seed == 0)]
    rows = []
    for name in ("labels apart", "features apart", "moved"):
        values, told = runs[name.replace(" ", "_")], (MISSING, MISSING)
        if values.nunique() > 1 and runs.pool.nunique() > 1:
            found = spearmanr(values, runs.pool)
            told = f"{found.statistic:+.2f}".replace("-", "−"), p_value(found.pvalue)
        rows.append([name, told[0], f"{len(runs)}", told[1]])
    return Table(["measure", "correlation", "runs", "p"], rows)


def _pool(runs: pd.DataFrame) -> list[str]:
    """Prompts at the end; how far local prompts moved and how far the pool is from them, in percent of their length."""
    size = MISSING if runs.pool.isna().any() else f"{runs.pool.mean():.0f}"
    shares = [MISSING if runs[name].isna().any() else f"{runs[name].mean():.1%}" for name in ("moved", "drift")]
    return [size, *shares]


@mpl.rc_context(STYLE)
def figure(table: pd.DataFrame) -> Figure:
    """Draw what every change costs or brings, a dot per seed, and what becomes of the pool over the rounds."""
    drawn = Figure(figsize=(13, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    _draw_differences(left, table[table.setting == FIRST])
    _draw_pools(right, table[table.setting == FIRST])
    return drawn


def _draw_differences(axes: Axes, runs: pd.DataFrame) -> None:
    base = runs[runs.method == BASE].set_index("seed").last10
    names = [name for name in runs.method.unique() if name != BASE]
    for place, name in enumerate(reversed(names)):
        points = 100 * (runs[runs.method == name].set_index("seed").last10 - base).dropna()
        axes.barh(place, points.mean(), color=ORANGE if points.mean() < 0 else BLUE, alpha=0.5, height=0.6)
        axes.plot(points, np.full(len(points), place), "o", color="black", markersize=3)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.axvline(0, color=GREY, linewidth=1)
    axes.grid(True, axis="x")
    axes.set_xlabel(f"points against pfpt, {FIRST.replace('alpha', 'α =')}")


def _draw_pools(axes: Axes, runs: pd.DataFrame) -> None:
    """A line per change and seed, one colour per change."""
    for name, colour in GROWING.items():
        for number, sizes in enumerate(runs[runs.method == name].pools):
            axes.plot([int(size) for size in sizes.split()], color=colour, label=name if number == 0 else None)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.grid(True)
    axes.set_xlabel("round")
    axes.set_ylabel("prompts in the pool")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
