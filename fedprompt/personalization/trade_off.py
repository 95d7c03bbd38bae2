"""What a personalization came to: means over clients, the best points of the trade-off, and its curve as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedprompt.client.personal import Point
from fedprompt.tracking.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE

MODEL = ["lr", "epoch", "lambda", "averaged"]  # columns that name one of a client's models
ACCURACIES = ["personal_accuracy", "robust_accuracy"]
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)


def table(lr: float, samples: Sequence[int], points: Sequence[Point]) -> pd.DataFrame:
    """A row per client and model; ``samples`` are the clients' training samples."""
    return pd.DataFrame(
        {
            "client": point.client,
            "samples": samples[point.client],
            "lr": lr,
            "epoch": point.epoch,
            "lambda": point.share,
            "averaged": point.averaged,
            "personal_accuracy": point.personal.accuracy,
            "robust_accuracy": point.robust.accuracy,
            "personal_loss": point.personal.loss,
            "robust_loss": point.robust.loss,
        }
        for point in points
    )


def curve(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over clients and their standard errors, a row per model; who has no test data of its own counts for one."""
    models = rows.groupby(MODEL, sort=False)[ACCURACIES]
    errors = models.sem().add_suffix("_error")
    return pd.concat([models.size().rename("clients"), models.mean(), errors], axis=1).reset_index()


def summary(points: pd.DataFrame) -> dict[str, Any]:
    """Start and best points of a curve: the most personal model, and the best balances of each kind of model.

    The balance is the mean of both accuracies. Kinds that were not asked for are None.
    """
    own = points[(points["lambda"] == 1) & ~points.averaged]
    start = own[own.epoch == 0].iloc[0]
    kinds = {"balanced": own, "interpolated": points[points["lambda"] < 1], "averaged": points[points.averaged]}
    return {
        "start": {name: float(start[name]) for name in ACCURACIES},
        "most_personal": _best(own, own.personal_accuracy),
        **{kind: _best(rows, rows[ACCURACIES].mean(axis=1)) for kind, rows in kinds.items()},
    }


def summaries(points: pd.DataFrame) -> dict[str, Any]:
    """The summary over all learning rates, and that of every rate under ``rates``."""
    rates = [{"lr": float(lr), **summary(rows)} for lr, rows in points.groupby("lr", sort=False)]
    return {**summary(points), "rates": rates}


def line(rate: dict[str, Any]) -> str:
    """One learning rate's summary, for the terminal: accuracy on own / on all data."""
    told = [f"lr {rate['lr']:g}: {_both(rate['start'])} at the start"]
    for kind, words in (
        ("most_personal", "most personal"),
        ("balanced", "best balance"),
        ("interpolated", "interpolated"),
        ("averaged", "averaged"),
    ):
        if best := rate[kind]:
            share = f", λ {best['lambda']:g}" if kind == "interpolated" else ""
            told.append(f"{words} {_both(best)} (epoch {best['epoch']}{share})")
    return "; ".join(told)


@mpl.rc_context(STYLE)
def figure(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Robustness over personalization, a panel per curve: a line per learning rate with a dot per epoch.

    Dashed: from the federated state to the model of the last epoch, by interpolation. Dotted: averaged models.
    """
    drawn = Figure(figsize=(2.5 + 4.5 * len(curves), 5), layout="constrained")
    panels = drawn.subplots(1, len(curves), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (title, points) in zip(panels, curves.items()):
        _draw(axes, points)
        axes.set_title(title)
    drawn.supxlabel("personalization: accuracy on a client's own test data (%)", fontsize=10)
    drawn.supylabel("robustness: accuracy on everybody's (%)", fontsize=10)
    every = pd.concat(curves.values())
    handles = [*panels[0].get_legend_handles_labels()[0], Line2D([], [], color=GREY, marker="o", label="every epoch")]
    if (every["lambda"] < 1).any():
        handles += [Line2D([], [], color=GREY, marker="D", markersize=4, linestyle="--", label="interpolated, at last")]
    if every.averaged.any():
        handles += [Line2D([], [], color=GREY, marker="s", markersize=4, linestyle=":", label="mean of the epochs")]
    drawn.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return drawn


def _draw(axes: Axes, points: pd.DataFrame) -> None:
    last = points.epoch.max()
    for number, (lr, rows) in enumerate(points.groupby("lr")):
        colour = COLOURS[number % len(COLOURS)]
        own = rows[(rows["lambda"] == 1) & ~rows.averaged].sort_values("epoch")
        between = rows[(rows.epoch == last) & ~rows.averaged].sort_values("lambda")
        between = pd.concat([own[:1], between])
        averaged = rows[rows.averaged].sort_values("epoch")
        _path(axes, own, color=colour, marker="o", linewidth=1.6, markersize=5, label=f"learning rate {lr:g}")
        if len(between) > 2:
            _path(axes, between, color=colour, marker="D", linewidth=1.2, markersize=4, linestyle="--", alpha=0.8)
        if len(averaged):
            _path(axes, averaged, color=colour, marker="s", linewidth=1.2, markersize=4, linestyle=":", alpha=0.8)
    start = 100 * points[points.epoch == 0].iloc[0][ACCURACIES].astype(float)
    axes.plot(*start, marker="*", color="black", markersize=13, linestyle="none", zorder=5, label="federated state")
    axes.grid(True)


def _path(axes: Axes, rows: pd.DataFrame, **style: Any) -> None:
    axes.plot(100 * rows.personal_accuracy, 100 * rows.robust_accuracy, **style)


def _best(rows: pd.DataFrame, by: pd.Series) -> dict[str, Any] | None:
    """The row that is highest ``by``, then in robustness, then the earliest."""
    if not len(rows) or by.isna().all():
        return None
    ordered = rows.assign(by=by).sort_values(["by", "robust_accuracy", "epoch"], ascending=[False, False, True])
    return ordered.iloc[0][["lr", "epoch", "lambda", *ACCURACIES]].to_dict()


def _both(best: dict[str, Any]) -> str:
    return f"{best['personal_accuracy']:.1%} / {best['robust_accuracy']:.1%}"
