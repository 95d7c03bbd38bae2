"""What the search of prompts shows a reader, made of its runs (results/prompts.csv): two tables and a figure.

Accuracies in that table are from 0 to 1, here they are in percent.
"""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedprompt.reports.tables import MISSING, Table
from fedprompt.tracking.plots import BLUE, GREY, STYLE
from studies.comparison.tables import difference
from studies.many_runs import SEARCH, spread

SEARCHED = ("init", "block", "length", "size")


def tables(table: pd.DataFrame) -> dict[str, Table]:
    """Both tables, by their titles."""
    return {
        "Searched: validation accuracy of the best of several rates (%)": searched(table[table.stage == SEARCH]),
        "Compared: test accuracy, mean of the last ten evaluations (%)": compared(table[table.stage == "compared"]),
    }


def searched(runs: pd.DataFrame) -> Table:
    """A row per kind of prompts, the best first: its best rates, validation accuracy, and seconds per round."""
    best = runs.loc[runs.groupby("method").validation.idxmax()].sort_values("validation", ascending=False)
    rows = [
        [run.method, run.rates, f"{100 * run.validation:.1f}", f"{run.seconds_per_round:.1f}"]
        for run in best.itertuples()
    ]
    return Table(["prompts", "best rates", "validation", "s/round"], rows)


def compared(runs: pd.DataFrame) -> Table:
    """A row per kind of prompts: accuracy, and the difference to none at that size, paired over seeds."""
    rows = []
    for method, of_prompts in runs.groupby("method", sort=False):
        none = runs[(runs.length == 0) & (runs["size"] == of_prompts["size"].iloc[0])]
        against = (MISSING,) * 3
        if of_prompts.length.iloc[0] > 0:
            against = difference(of_prompts.set_index("seed").last10, none.set_index("seed").last10)
        rows.append([method, spread(100 * of_prompts.last10), *against])
    return Table(["prompts", "test, last ten", "against none", "seeds", "p"], rows)


@mpl.rc_context(STYLE)
def figure(table: pd.DataFrame) -> Figure:
    """Draw validation accuracy over what was searched, a panel each: every trial a dot, a line through the best."""
    runs = table[table.stage == SEARCH]
    drawn = Figure(figsize=(12, 3.6), layout="constrained")
    panels = drawn.subplots(1, len(SEARCHED), sharey=True)
    for axes, name in zip(panels, SEARCHED):
        _draw(axes, name, _alike(runs[runs.length > 0], name))
        axes.set_xlabel({"init": "start", "size": "image size (px)", "length": "prompts"}.get(name, name))
    none = runs[runs.length == 0].groupby("size").validation.max()
    places = [int(label.get_text()) for label in panels[-1].get_xticklabels()]
    panels[-1].plot(range(len(places)), 100 * none.reindex(places), "s--", color=GREY, label="no prompts")
    panels[-1].legend(frameon=False)
    panels[0].set_ylabel("validation accuracy (%)")
    return drawn


def _alike(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The trials among which ``name`` took most values while all else that is searched stayed as it was."""
    others = [other for other in SEARCHED if other != name]
    groups = [group for _, group in runs.groupby(others)]
    return max(groups, key=lambda group: (group[name].nunique(), group.validation.max()))


def _draw(axes: Axes, name: str, runs: pd.DataFrame) -> None:
    values = sorted(runs[name].unique(), key=lambda value: (value != "uniform", value) if name == "init" else value)
    for place, value in enumerate(values):
        of_value = 100 * runs[runs[name] == value].validation
        axes.plot([place] * len(of_value), of_value, "o", color=BLUE, alpha=0.35, markersize=4)
    best = [100 * runs[runs[name] == value].validation.max() for value in values]
    axes.plot(range(len(values)), best, "-", color=BLUE)
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.grid(True, axis="y")
