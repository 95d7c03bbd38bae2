"""The figures of a study: methods in panels or rows of their own, as many of them as there are, and never on top."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fedprompt.reports.groups import Group
from fedprompt.tracking.plots import BLUE, ORANGE, STYLE, figure_text, prompts_figure, trajectory_figure
from fedprompt.tracking.runs import Run

COLUMNS = 4  # of small multiples
CHARACTERS_PER_INCH = 12  # of captions, at their font size
LIGHT = "#C9C9C9"
MAPPED = 2000  # prompts on a map: of more, t-SNE takes minutes and shows no more
SNAPSHOT = re.compile(r"round_(\d+)\.npy")
LONGEST_NAME = 200  # characters of a method's name in a figure, over several lines

Curve = tuple[np.ndarray, np.ndarray]  # x [n] and y [seeds, n]


def accuracy_over_rounds(groups: Sequence[Group]) -> Figure:
    """Test accuracy of every evaluation."""
    curves = {group.method: _curve(group, _rounds) for group in groups}
    return _multiples(curves, "communication round", "test accuracy (%)")


def accuracy_over_bytes(groups: Sequence[Group]) -> Figure | None:
    """Test accuracy over the megabytes that all clients have sent and received; None where nobody sent anything."""
    curves = {group.method: _curve(group, _megabytes) for group in groups}
    sent = {method: (x, y) for method, (x, y) in curves.items() if len(x) and x[0] > 0}
    return _multiples(sent, "sent and received so far (MB)", "test accuracy (%)", log=True) if sent else None


def accuracy_over_alpha(groups: Sequence[Group]) -> Figure | None:
    """Mean of the last ten evaluations over α, of experiments that differ in nothing else; None with one α."""
    by_method: dict[str, dict[float, np.ndarray]] = {}
    for group in groups:
        last10 = np.array([100 * run.result["last10"]["accuracy"] for run in group.runs])
        by_method.setdefault(group.method, {})[group.keys["partition.alpha"]] = last10
    if len({alpha for of_method in by_method.values() for alpha in of_method}) < 2:
        return None
    curves = {}
    for method, of_method in by_method.items():
        alphas = sorted(of_method)
        most = max(len(values) for values in of_method.values())
        padded = [np.pad(of_method[a], (0, most - len(of_method[a])), constant_values=np.nan) for a in alphas]
        curves[method] = (np.array(alphas), np.stack(padded, axis=1))
    figure = _multiples(curves, "α of the Dirichlet partition", "test accuracy, last ten (%)", log=True)
    alphas = sorted({alpha for of_method in by_method.values() for alpha in of_method})
    for axes in figure.axes:
        axes.xaxis.set_major_locator(FixedLocator(alphas))
        axes.xaxis.set_minor_locator(NullLocator())
    return figure


def pool_over_rounds(groups: Sequence[Group]) -> Figure | None:
    """Prompts in the pool, where their number changes; None where it does nowhere."""
    curves = {}
    for group in groups:
        pools = [[(r["round"], r["aggregate"]["pool_size"]) for r in run.records if _has_pool(r)] for run in group.runs]
        rounds = sorted(set.intersection(*(set(dict(pool)) for pool in pools)))
        sizes = np.array([[dict(pool)[round] for round in rounds] for pool in pools])
        if sizes.size and np.ptp(sizes) > 0:
            curves[group.method] = (np.array(rounds), sizes)
    if not curves:
        return None
    figure = _multiples(curves, "communication round", "prompts in the pool")
    sizes = np.concatenate([y.ravel() for _, y in curves.values()])
    for axes in figure.axes:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        if sizes.max() > 5 * sizes.min() > 0:  # some grow and some do not: both must be seen
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            _number_ticks(axes.yaxis)
    return figure


@mpl.rc_context(STYLE)
def accuracy_of_seeds(groups: Sequence[Group]) -> Figure:
    """Mean of the last ten evaluations: a dot per seed, a bar at the mean."""
    rows = {g.method: np.array([100 * run.result["last10"]["accuracy"] for run in g.runs]) for g in groups}
    figure, axes = _rows(rows, "test accuracy, mean of the last ten evaluations (%)", "dot: a seed")
    for place, values in enumerate(rows.values()):
        axes.plot(values, np.full(len(values), place), "o", color=BLUE, markersize=5, alpha=0.7, markeredgewidth=0)
        if len(values) > 1:
            axes.plot([values.mean()], [place], "|", color=ORANGE, markersize=15, markeredgewidth=2.5)
    return figure


@mpl.rc_context(STYLE)
def accuracy_of_clients(groups: Sequence[Group]) -> Figure | None:
    """Every client's accuracy on its local test data after the last round, all seeds; None where runs do not tell."""
    told = {g.method: [run.result["clients"].get("accuracies") or [] for run in g.runs] for g in groups}
    rows = {m: 100 * np.array([a for run in runs for a in run if a is not None]) for m, runs in told.items()}
    rows = {method: values for method, values in rows.items() if len(values)}
    if not rows:
        return None
    figure, axes = _rows(rows, "accuracy on a client's own test data, last round (%)", "dot: a client of one seed")
    for place, values in enumerate(rows.values()):
        # A fixed pattern instead of noise: the same runs always give the same picture.
        offsets = 0.28 * (2 * ((np.arange(len(values)) * 0.618034) % 1) - 1)
        axes.plot(np.sort(values), place + offsets, "o", color=BLUE, markersize=3.5, alpha=0.4, markeredgewidth=0)
        axes.plot([values.mean()], [place], "|", color=ORANGE, markersize=17, markeredgewidth=2.5)
    return figure


def trajectory(pools: Mapping[int, np.ndarray], tsne: bool = False) -> Figure | None:
    """The prompts of all rounds, {round: [P, D]}, by PCA or by t-SNE; None of fewer than five prompts.

    t-SNE runs on one thread: several slow each other down on so few prompts.
    """
    pools = _thinned(pools)
    count = sum(len(pool) for pool in pools.values())
    if count < 5:
        return None
    if not tsne:
        return trajectory_figure(pools)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    mapping = TSNE(perplexity=min(30.0, (count - 1) / 3), init="random", random_state=0)
    with threadpool_limits(1), np.errstate(all="ignore"):  # prompts that are all alike have distances of 0
        points = mapping.fit_transform(np.concatenate(list(pools.values())).astype(np.float64))
    labels = ("distances are only meaningful between neighbours (t-SNE)", "")
    return prompts_figure(pools, points, labels)


def load_pools(run: Run) -> dict[int, np.ndarray]:
    """The finite prompts of the snapshots in a run's folder, {round: [P, D]}; without those that cannot be read."""
    pools = {}
    for path in sorted(Path(run.folder, "pools").glob("round_*.npy")):
        name = SNAPSHOT.fullmatch(path.name)
        try:
            pool = np.load(path, allow_pickle=False) if name and path.is_file() else None
        except (OSError, ValueError, EOFError):
            continue
        if name and pool is not None and pool.ndim == 2 and np.issubdtype(pool.dtype, np.floating):
            pools[int(name.group(1))] = pool[np.isfinite(pool).all(axis=1)]
    widths = [pool.shape[1] for pool in pools.values()]
    return {round: pool for round, pool in pools.items() if pool.shape[1] == max(widths, key=widths.count)}


def _curve(group: Group, x_of: Callable[[Run], dict[int, float]]) -> Curve:
    """A group's x [n], mean over seeds, and test accuracy in percent [seeds, n], at the rounds that all seeds share."""
    rounds = sorted(set.intersection(*({r["round"] for r in run.evaluations} for run in group.runs)))
    scores = [{r["round"]: 100 * r["test"]["accuracy"] for r in run.evaluations} for run in group.runs]
    x = np.mean([[x_of(run)[round] for round in rounds] for run in group.runs], axis=0)
    return x, np.array([[of_run[round] for round in rounds] for of_run in scores])


def _rounds(run: Run) -> dict[int, float]:
    return {record["round"]: record["round"] for record in run.records}


def _megabytes(run: Run) -> dict[int, float]:
    parts = [record.get("communication", {}) for record in run.records]
    sent = [part.get("up_bytes", 0) + part.get("down_bytes", 0) for part in parts]
    return {record["round"]: total for record, total in zip(run.records, np.cumsum(sent) / 1e6)}


def _has_pool(record: dict[str, Any]) -> bool:
    return record.get("aggregate", {}).get("pool_size") is not None


def _thinned(pools: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Leave out rounds, evenly, until there are few enough prompts; the first and the last stay."""
    rounds = sorted(pools)
    prompts = sum(len(pool) for pool in pools.values())
    if prompts > MAPPED:
        kept = max(2, len(rounds) * MAPPED // prompts)
        rounds = [rounds[i] for i in np.unique(np.linspace(0, len(rounds) - 1, kept).round().astype(int))]
    return {round: pools[round] for round in rounds}


@mpl.rc_context(STYLE)
def _multiples(curves: Mapping[str, Curve], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """A panel per method: its mean over seeds and their range, over the other methods' means in grey."""
    rows = -(-len(curves) // COLUMNS)
    columns = -(-len(curves) // rows)
    width = max(5.0, 2.7 * columns)
    figure = Figure(figsize=(width, 2.1 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    means = {method: (x, np.nanmean(y, axis=0)) for method, (x, y) in curves.items()}
    for axes, (method, (x, y)) in zip(panels, curves.items()):
        for other in (means[name] for name in curves if name != method):
            axes.plot(*other, color=LIGHT, linewidth=0.8, zorder=1)
        if len(y) > 1:
            axes.fill_between(x, np.nanmin(y, axis=0), np.nanmax(y, axis=0), color=BLUE, alpha=0.22, linewidth=0)
        axes.plot(*means[method], color=BLUE, linewidth=1.8, marker="o", markersize=3 if len(x) <= 12 else 0, zorder=3)
        axes.set_title(_wrapped(method), fontsize=10)
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if log:
            axes.set_xscale("log")
            _number_ticks(axes.xaxis)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(curves) - columns) : len(curves)]:
        axes.tick_params(labelbottom=True)
    several = any(len(y) > 1 for _, y in curves.values())
    told = ["blue: the method" + (", mean over its seeds; band: lowest to highest seed" if several else "")]
    told += ["grey: the other methods"] if len(curves) > 1 else []
    legend = textwrap.fill(f"({'; '.join(told)})", int(CHARACTERS_PER_INCH * width))
    figure.supxlabel(f"{xlabel}\n{legend}", fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return figure


def _number_ticks(axis: Axis) -> None:
    """Plain numbers instead of powers on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _wrapped(method: str) -> str:
    """Break a long name between its parts, never within one."""
    parts = figure_text(method, LONGEST_NAME).split(", ")
    whole = ", ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    return "\n".join(textwrap.wrap(whole, 28))


def _rows(rows: Mapping[str, np.ndarray], xlabel: str, dot: str) -> tuple[Figure, Axes]:
    """An empty row per method, the first on top."""
    figure = Figure(figsize=(8, 0.3 * len(rows) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.yaxis.set_major_locator(FixedLocator(range(len(rows))))
    axes.set_yticklabels([figure_text(name, LONGEST_NAME) for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{xlabel}\n({dot}; bar: the mean)")
    axes.grid(True)
    return figure, axes
