"""The figures of one run, drawn without pyplot: a program that imports fedprompt keeps its own backend and figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedprompt.texts import LONGEST, escaped, printable
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.metrics import Record

# Okabe and Ito's palette: told apart with every common kind of colour vision.
BLUE, ORANGE, GREEN, PURPLE, GREY, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555", "#56B4E9"
NAMED_CLASSES = 40  # more class names would overlap
NUMBERED_CLIENTS = 15  # with more, numbers do not fit into the cells
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "figure.dpi": 120,
    "figure.facecolor": "white",
}


@mpl.rc_context(STYLE)
def accuracy_figure(records: Sequence[Record]) -> Figure:
    """Draw test and validation accuracy over the rounds and, below, training loss and pool size where there are any."""
    wanted = {
        "training loss\n(nats)": ("train", "loss", PURPLE),
        "pool size\n(prompts)": ("aggregate", "pool_size", GREEN),
    }
    below = {label: (*_series(records, *key), colour) for label, (*key, colour) in wanted.items()}
    below = {label: series for label, series in below.items() if len(series[0])}
    ratios = [2.4] + [1] * len(below)
    figure = Figure(figsize=(8, 1.5 * sum(ratios)), layout="constrained")
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for split, line_colour, marker in (("test", BLUE, "o"), ("validation", ORANGE, "s")):
        rounds, accuracy = _series(records, split, "accuracy")
        if len(rounds):
            panels[0].plot(rounds, 100 * accuracy, color=line_colour, marker=marker, label=split, **_line(len(rounds)))
    panels[0].set_ylabel("accuracy (%)")
    if panels[0].lines:
        panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
    for axes, (label, (rounds, values, colour)) in zip(panels[1:], below.items()):
        axes.plot(rounds, values, color=colour, marker="o", **_line(len(rounds)))
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=label.startswith("pool")))
    for axes in panels:
        axes.grid(True)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel("communication round")
    figure.align_ylabels(panels)
    return figure


@mpl.rc_context(STYLE)
def partition_figure(class_counts: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw how many samples of each class each client has, counts [N, K], with the clients' totals above."""
    clients, classes = class_counts.shape
    rows = classes if classes <= NAMED_CLASSES else NAMED_CLASSES // 2
    width, height = float(np.clip(3 + 0.08 * clients, 8, 16)), 2.4 + 0.26 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    totals, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1, 0.26 * rows + 0.4])
    totals.bar(np.arange(clients), class_counts.sum(axis=1), width=0.8 if clients <= 60 else 1, color=GREY)
    totals.set_ylabel("images")
    totals.grid(True, axis="y")
    totals.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    # A logarithmic scale, as one class may fill a client while another has a handful; none at all stays white.
    counts = np.ma.masked_equal(class_counts.T, 0)  # [K, N]
    most = max(2, int(class_counts.max(initial=2)))
    norm = LogNorm(1, most)
    image = heat.imshow(counts, cmap="viridis_r", norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=heat, label="images (white: none)", pad=0.01, aspect=15 + rows)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter("{x:.0f}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    if clients <= NUMBERED_CLIENTS and classes <= NAMED_CLASSES:
        _write_counts(heat, class_counts, dark_above=most**0.5)
    if classes <= NAMED_CLASSES:
        heat.set_yticks(range(classes), [figure_text(name) for name in class_names])
    heat.xaxis.set_major_locator(MaxNLocator(integer=True))
    heat.set_xlim(-0.5, clients - 0.5)
    heat.set_xlabel("client")
    heat.set_ylabel("class")
    return figure


def trajectory_figure(pools: Mapping[int, np.ndarray]) -> Figure:
    """Draw the prompts of all rounds, {round: [P, D]}, in the plane of their two principal components.

    Raises:
        ValueError: there are fewer than two prompts, a prompt is not finite, or D < 2.
    """
    # Takes a second to import, and is needed once per run.
    from sklearn.decomposition import PCA

    prompts = np.concatenate(list(pools.values())).astype(np.float64)  # [rows, D]
    with np.errstate(invalid="ignore"):  # prompts that are all alike have no variance to divide by
        pca = PCA(n_components=2, random_state=0).fit(prompts)
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    labels = (
        f"first principal component ({shares[0]:.0%} of the variance)",
        f"second principal component ({shares[1]:.0%})",
    )
    return prompts_figure(pools, pca.transform(prompts), labels)


@mpl.rc_context(STYLE)
def prompts_figure(pools: Mapping[int, np.ndarray], points: np.ndarray, labels: tuple[str, str]) -> Figure:
    """Draw points [rows, 2] of the prompts of all rounds, {round: [P, D]}; ``labels`` name the two axes."""
    rounds = np.concatenate([np.full(len(pool), round) for round, pool in pools.items()])
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    dots = axes.scatter(points[:, 0], points[:, 1], c=rounds, cmap="viridis", s=14, linewidths=0)
    for round, marker, colour in ((rounds.min(), "s", BLUE), (rounds.max(), "o", ORANGE)):
        ends = points[rounds == round]
        axes.scatter(
            ends[:, 0], ends[:, 1], marker=marker, s=60, facecolors="none", edgecolors=colour, label=f"round {round}"
        )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
    figure.colorbar(dots, ax=axes, label="communication round", pad=0.01)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(True)
    return figure


def figure_text(text: str, longest: int = LONGEST) -> str:
    """Return a text of the user's as matplotlib draws it letter by letter: one line, no mathematics, no missing glyph.

    Use it for names of classes, domains and methods. A character that the font lacks becomes an escape, such as
    ``\\u732b``, so that names stay apart.
    """
    font = get_font(findfont(FontProperties()))
    drawn = "".join(c if font.get_char_index(ord(c)) else escaped(c) for c in printable(text, longest))
    return printable(drawn, longest).replace("$", r"\$")


def pixels(figure: Figure) -> np.ndarray:
    """Return the drawn figure as uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file, atomically."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomic(Path(path), content.getvalue())


def _series(records: Sequence[Record], section: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounds and values [n] of a metric, where it is present."""
    pairs = [(record["round"], record.get(section, {}).get(name)) for record in records]
    found = np.array([pair for pair in pairs if pair[1] is not None], dtype=float).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _line(points: int) -> dict[str, float]:
    """Return line settings: markers show single evaluations, and go where they would touch."""
    return {"linewidth": 1.6, "markersize": 4 if points <= 40 else 0}


def _write_counts(axes: Axes, class_counts: np.ndarray, dark_above: float) -> None:
    for (client, label), count in np.ndenumerate(class_counts):
        if count:
            colour = "white" if count > dark_above else "black"
            axes.text(client, label, f"{count}", ha="center", va="center", fontsize=9, color=colour)
