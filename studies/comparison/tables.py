"""What the comparison of methods shows a reader, made of its table of runs: its tables and a figure.

That table has a row per run (``comparison.table``, results/comparison.csv). Accuracies in it are from 0 to 1, here
they are in percent.
"""

from __future__ import annotations

from pathlib import Path

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from fedprompt.reports.tables import MISSING, Table, p_value
from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, STYLE, save
from studies.comparison.contestants import (
    APART,
    BEHIND,
    CAPPED,
    DATA,
    FIRST,
    HEADLINE,
    SEEDS,
    SETTLED,
    SKEW,
    WHOLE,
    setting_of,
)
from studies.many_runs import spread

OURS = ("pfpt", "pfpt-mem", "fedmem, pool")  # the study's method, and what has no published form
HARDEST_FIRST = ("dominant", "alpha 0.1", "alpha 0.5")
COLOURS = (ORANGE, GREEN, PURPLE, SKY, "#E69F00", GREY)
# Of lines: colour, style, width.
LOOKS = {"pfpt": (BLUE, "-", 3.0), "pfpt-mem": (BLUE, ":", 3.0), "full, fedavg": (GREY, ":", 1.5)}
OTHERS = [(colour, style, 1.5) for style in ("-", "--") for colour in COLOURS]


def tables(table: pd.DataFrame) -> dict[str, Table]:
    """All tables that have a row, by their titles."""
    headline, study, untuned = (table[table.stage == stage] for stage in ("headline", "study", "untuned"))
    runs = _of_all(headline)
    settled = headline[(headline.setting == FIRST) & headline.method.isin(SETTLED)]
    all_tables = {
        **{
            f"{data}: test accuracy, mean of the last ten evaluations (%)": accuracies(its_runs)
            for data, its_runs in _by_data(runs).items()
        },
        "Against the best baseline (points)": against_best_baseline(runs),
        **_with_differences(f"All seeds of {FIRST}", settled),
        f"Costs and other scores at {FIRST}": costs(runs, FIRST),
        "Rates by data set": rates(runs),
        "Those rates against what was chosen on all images (points)": against_carried(table),
        f"Memories and pools apart, at {setting_of(*BEHIND)}: test accuracy (%)": apart(table),
        **_with_differences("In the study's federation", study),
        f"Once each, at {FIRST}": once(table),
        **_with_differences("Where nothing was tuned", untuned),
    }
    return {title: made for title, made in all_tables.items() if made.rows}


def _with_differences(where: str, runs: pd.DataFrame) -> dict[str, Table]:
    return {
        f"{where}: test accuracy (%)": accuracies(runs),
        f"{where}: against the best baseline (points)": against_best_baseline(runs),
    }


def accuracies(runs: pd.DataFrame) -> Table:
    """A row per method, a column per setting: mean ± standard deviation over seeds; the best mean is bold.

    Methods are in the order of their mean over the settings that all of them have.
    """
    means = runs.pivot_table(index="method", columns="setting", values="last10", sort=False)
    means = means.loc[means.dropna(axis="columns").mean(axis=1).sort_values(ascending=False).index]
    rows = [
        [method, *(_cell(runs[(runs.method == method) & (runs.setting == setting)].last10) for setting in means)]
        for method in means.index
    ]
    best = {(int(np.nanargmax(means[setting])), j) for j, setting in enumerate(means, start=1)}
    return Table(["method", *means], rows, frozenset(best))


def against_best_baseline(all_runs: pd.DataFrame) -> Table:
    """A row per setting and method of ours: minus the baseline that is best on validation, in points.

    Variants of PFPT are no baselines, nor are whole backbones: they send a hundred times as much. Paired over seeds; p
    is of a two-sided t-test.
    """
    rows = []
    for setting, runs in all_runs.groupby("setting", sort=False):
        by_seed = runs.pivot(index="seed", columns="method", values="last10").dropna(axis="columns")
        baselines = runs[runs.method.isin(by_seed.columns.difference((*OURS, *CAPPED, *WHOLE)))]
        if baselines.empty:
            continue
        best = baselines.groupby("method").validation.mean().idxmax()
        for ours in (method for method in OURS if method in by_seed):
            rows.append([setting, ours, best, *difference(by_seed[ours], by_seed[best])])
    return Table(["setting", "method", "best baseline on validation", "difference", "seeds", "p"], rows)


def difference(ours: pd.Series, theirs: pd.Series) -> tuple[str, str, str]:
    """Accuracies by seed minus others': points over the seeds that both have, how many, and p of a two-sided t-test."""
    both = pd.concat([ours, theirs], axis=1).dropna().to_numpy()  # [seeds, 2]
    points = spread(100 * (both[:, 0] - both[:, 1]))
    if points.startswith(("0.0", "-0.0")):
        signed = points.removeprefix("-")
    else:
        signed = points.replace("-", "−") if points.startswith("-") else f"+{points}"
    p = ttest_rel(both[:, 0], both[:, 1]).pvalue if len(both) > 1 else None
    return signed, f"{len(both)}", p_value(p)


def show(made: dict[str, Table], drawn: Figure, csv: Path) -> None:
    """Print tables, save the figure next to their CSV, and say where both are."""
    for title, table in made.items():
        click.echo(f"## {title}\n\n{table.markdown()}")
    save(drawn, csv.with_suffix(".png"))
    click.echo(f"written: {csv}, {csv.with_suffix('.png')}")


def costs(runs: pd.DataFrame, setting: str) -> Table:
    """A row per method in one setting: other scores, what it sends and how long it takes."""
    runs = runs[runs.setting == setting]
    rows = [
        [
            method,
            *(_cell(of_method[column]) for column in ("best", "last10_clients", "last10_worst_decile")),
            f"{of_method.bytes_per_round.mean() / 1e6:.1f}",
            f"{of_method.saved_of_full.mean():.1%}",
            f"{of_method.seconds_per_round.mean():.1f}",
        ]
        for method, of_method in runs.groupby("method", sort=False)
    ]
    return Table(["method", "best", "own clients", "worst decile", "MB/round", "saved", "s/round"], rows)


def rates(runs: pd.DataFrame) -> Table:
    """A row per method, a column per data set: what its search there chose."""
    chosen = {data: its_runs.groupby("method").rates.first() for data, its_runs in _by_data(runs).items()}
    rows = [[method, *(_short(of.get(method)) for of in chosen.values())] for method in runs.method.unique()]
    return Table(["method", *chosen], rows)


def against_carried(table: pd.DataFrame) -> Table:
    """A row per method, a column per data set: what rates that were searched there gain over those of all images."""
    headline, carried = (table[table.stage == stage] for stage in ("headline", "carried"))
    settings = list(carried.setting.unique())
    rows = []
    for method in carried.method.unique():
        by_seed = [
            [runs[(runs.method == method) & (runs.setting == setting)].set_index("seed").last10 for setting in settings]
            for runs in (headline, carried)
        ]
        rows.append([method, *(MISSING if old.empty else difference(new, old)[0] for new, old in zip(*by_seed))])
    return Table(["method", *settings], rows)


def apart(table: pd.DataFrame) -> Table:
    """A row per method with a memory or a pool alone, and per headline method that it is compared with."""
    there = table[table.setting == setting_of(*BEHIND)]
    runs = there[there.stage == "apart"]
    kin = there[(there.stage == "headline") & there.method.isin({kin for _, kin in APART.values()})]
    return accuracies(runs if runs.empty else pd.concat([kin, runs]))


def _short(rates: str | None) -> str:
    """Of keys their last word."""
    return MISSING if rates is None else ", ".join(rate.partition(".")[2] for rate in rates.split())


def once(table: pd.DataFrame) -> Table:
    """A row per run of what runs once, the best on top: accuracies, and megabytes of a round."""
    runs = table[table.stage == "once"].sort_values("last10", ascending=False)
    rows = [
        [
            run.method,
            *(_cell([value]) for value in (run.last10, run.last10_own_head, run.best, run.last10_clients)),
            f"{run.bytes_per_round / 1e6:.1f}",
        ]
        for run in runs.itertuples()
    ]
    return Table(["method", "last ten", "own heads", "best", "own clients", "MB/round"], rows)


@mpl.rc_context(STYLE)
def figure(table: pd.DataFrame) -> Figure:
    """Accuracy, mean of the last ten evaluations, over the kinds of skew: a panel per data set, a line per method.

    Bars are standard errors over seeds.
    """
    runs = _of_all(table[table.stage == "headline"])
    present = _by_data(runs)
    methods = runs.groupby("method").last10.mean().sort_values(ascending=False).index
    looks = {**LOOKS, **dict(zip((method for method in HEADLINE if method not in LOOKS), OTHERS))}
    drawn = Figure(figsize=(3.6 * len(present) + 2.4, 4.2), layout="constrained")
    panels = drawn.subplots(1, len(present), sharey=True, squeeze=False)[0]
    for axes, data in zip(panels, present):
        for number, method in enumerate(methods):
            colour, style, width = looks[method]
            means, errors = _over_skew(runs[runs.method == method], data)
            places = np.arange(len(means)) + 0.025 * (number - len(methods) / 2)  # side by side: bars would overlap
            line = {"color": colour, "linestyle": style, "linewidth": width, "marker": "o", "markersize": 3}
            axes.errorbar(places, means, errors, elinewidth=1, label=method, **line)
        axes.set_xticks(range(len(HARDEST_FIRST)), [skew.replace("alpha", "α =") for skew in HARDEST_FIRST])
        axes.set_xlim(-0.4, len(HARDEST_FIRST) - 0.6)
        axes.set_title(data)
        axes.grid(True, axis="y")
    panels[0].set_ylabel("test accuracy, last ten (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right center", frameon=False)
    return drawn


def _of_all(headline: pd.DataFrame) -> pd.DataFrame:
    """The headline runs on the seeds that all methods have."""
    return headline[headline.seed.isin(SEEDS)]


def _by_data(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs on every data set that has any, under whatever skew."""
    of_data = {data: runs[runs.setting.isin([setting_of(data, skew) for skew in SKEW])] for data in DATA}
    return {data: its_runs for data, its_runs in of_data.items() if not its_runs.empty}


def _over_skew(runs: pd.DataFrame, data: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error in percent [skews]; NaN where there is nothing, 0 for the error of one seed."""
    by_skew = [100 * runs[runs.setting == setting_of(data, skew)].last10 for skew in HARDEST_FIRST]
    return np.array([s.mean() for s in by_skew]), np.array([s.sem() if len(s) > 1 else 0 for s in by_skew])


def _cell(values: pd.Series | list[float]) -> str:
    values = pd.Series(values, dtype=float)
    return MISSING if values.isna().any() or values.empty else spread(100 * values)
