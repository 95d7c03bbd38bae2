"""A study in numbers: one raw table for programs (CSV), and a table per setting for readers (Markdown, LaTeX)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedprompt.reports.groups import Group, is_rate, varying
from fedprompt.reports.statistics import Comparison
from fedprompt.tracking.runs import Run

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A measured column: its head, a run's value (None where it has none), how it is written and which value is best.

    ``scale`` is for readers: 100 for percent. ``better``: +1 larger, -1 smaller, 0 neither.
    """

    head: str
    value: Callable[[Run], float | None]
    scale: float = 100
    digits: int = 1
    better: int = 1


def _score(part: str, name: str) -> Callable[[Run], float | None]:
    return lambda run: run.result[part].get(name)


def _bytes(run: Run) -> float:
    return run.result["communication"]["up_bytes"] + run.result["communication"]["down_bytes"]


def _saved(run: Run) -> float | None:
    full = run.result["communication"]["full_model_bytes"]
    return 1 - _bytes(run) / full if full else None


COLUMNS: dict[str, Column] = {
    "best": Column("best", _score("best", "accuracy")),
    "last": Column("last", _score("final", "accuracy")),
    "last10": Column("last ten", _score("last10", "accuracy")),
    "validation": Column("validation", _score("last10", "validation_accuracy")),
    "clients": Column("own clients", _score("last10", "client_mean_accuracy")),
    "worst_decile": Column("worst decile", _score("last10", "client_worst_decile_accuracy")),
    "bytes_per_round": Column("MB/round", lambda run: _bytes(run) / run.result["rounds"], 1e-6, 2, -1),
    "saved": Column("saved (%)", _saved, 100, 2),
    "seconds_per_round": Column("s/round", lambda run: run.result["seconds"]["total"] / run.result["rounds"], 1, 1, -1),
}
ONLY_RAW: dict[str, Column] = {  # of personal heads
    "own_head": Column("own heads", _score("last10", "client_own_head_global_accuracy")),
    "averaged_head": Column("averaged head", _score("last10", "client_averaged_head_global_accuracy")),
}
WITHOUT_SPREAD = ("bytes_per_round", "saved", "seconds_per_round")
COMPARED = ["method", "baseline", "seeds", "difference", "95 % interval", "p (t)", "Holm", "p (Wilcoxon)", "Holm"]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; ``bold`` holds (row, column) of what stands out."""

    head: list[str]
    rows: list[list[str]]
    bold: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """As a pipe table."""
        body = [
            [f"**{t}**" if (i, j) in self.bold else t for j, t in enumerate(row)] for i, row in enumerate(self.rows)
        ]
        lines = [self.head, ["---"] * len(self.head), *body]
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines) + "\n"

    def latex(self, caption: str, label: str) -> str:
        """As a floating table with the rules of booktabs."""
        rows = [
            [rf"\textbf{{{latex(t)}}}" if (i, j) in self.bold else latex(t) for j, t in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        numbers = "r" * (len(self.head) - 2)
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{latex(caption)}}}",
                rf"\label{{tab:{label}}}",
                r"\centering\scriptsize\setlength{\tabcolsep}{2.5pt}",
                rf"\begin{{tabular}}{{@{{}}ll{numbers}@{{}}}}",
                r"\toprule",
                " & ".join(map(latex, self.head)) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )


def latex(text: str) -> str:
    """Escape what LaTeX would read as a command, and write signs that its fonts lack as commands."""
    commands = {c: f"\\{c}" for c in "&%$#_{}"} | {
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$"},
        **{"±": r"$\pm$", "–": "--", "−": "$-$", "≥": r"$\geq$", "α": r"$\alpha$"},
    }
    return "".join(commands.get(character, character) for character in text)


def values(group: Group, column: Column) -> np.ndarray:
    """The column's value of every seed [n]; NaN where a run has none."""
    found = [column.value(run) for run in group.runs]
    return np.array([math.nan if value is None else value for value in found], dtype=float)


def spread(numbers: np.ndarray) -> float:
    """Sample standard deviation over seeds; NaN of one seed."""
    return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan


def raw_table(groups: Sequence[Group], comparisons: dict[tuple[str, str], Comparison]) -> pd.DataFrame:
    """A row per experiment, with all digits: accuracies from 0 to 1, bytes, seconds; then what varies, and rates."""
    vary = varying([group.keys for group in groups])
    rates = [key for key in dict.fromkeys(key for group in groups for key in group.keys) if is_rate(key)]
    rows = []
    for group in groups:
        seeds = " ".join(map(str, group.seeds))
        row: dict[str, Any] = {"setting": group.setting, "method": group.method, "n": len(group.runs), "seeds": seeds}
        for name, column in (COLUMNS | ONLY_RAW).items():
            numbers = values(group, column)
            row |= {f"{name}_mean": float(numbers.mean()), f"{name}_std": spread(numbers)}
        comparison = comparisons.get((group.setting, group.method))
        told = asdict(comparison) if comparison else dict.fromkeys(Comparison.__dataclass_fields__)
        told["seeds"] = " ".join(map(str, told["seeds"] or ()))
        row |= {f"compared_{key}": value for key, value in told.items() if key != "method"}
        rows.append({**row, **{key: group.keys.get(key) for key in dict.fromkeys((*vary, *rates))}})
    return pd.DataFrame(rows)


def setting_table(groups: Sequence[Group]) -> Table:
    """A row per method of a setting, in percent; the best mean of a column is bold.

    Among the methods with the most seeds: a mean of fewer may be best because its seeds are easy.
    """
    most = max(len(group.runs) for group in groups)
    head = ["method", "rates", "seeds", *(column.head for column in COLUMNS.values())]
    rows = [[group.method, group.rates, f"{len(group.runs)}"] for group in groups]
    bold = set()
    for place, (name, column) in enumerate(COLUMNS.items(), start=3):
        means = np.array([values(group, column).mean() for group in groups])
        for row, group in zip(rows, groups):
            row.append(written(group, column, name not in WITHOUT_SPREAD))
        ranked = np.where([len(group.runs) == most for group in groups], column.better * means, math.nan)
        if len(groups) > 1 and not np.isnan(ranked).all():
            shown = np.round(ranked * column.scale, column.digits)  # what reads the same is equally good
            bold |= {(int(i), place) for i in np.flatnonzero(shown == np.nanmax(shown))}
    table = Table(head, rows, frozenset(bold))
    return table if any(group.rates for group in groups) else _without(table, 1)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row per comparison: differences in percentage points."""
    rows = [
        [
            *(c.method, c.baseline, " ".join(map(str, c.seeds)), _points(c.difference)),
            MISSING if math.isnan(c.low) else f"{_points(c.low)} to {_points(c.high)}",
            *map(p_value, (c.p_t, c.p_t_holm, c.p_wilcoxon, c.p_wilcoxon_holm)),
        ]
        for c in comparisons
    ]
    table = Table(COMPARED, rows)
    return table if any(c.p_wilcoxon is not None for c in comparisons) else _without(_without(table, 8), 7)


def written(group: Group, column: Column, with_spread: bool = True) -> str:
    """A group's mean ± deviation over its seeds as tables show it; without the deviation of one seed."""
    numbers = values(group, column)
    if np.isnan(numbers).any():
        return MISSING
    mean = f"{column.scale * numbers.mean():.{column.digits}f}"
    deviation = column.scale * spread(numbers)
    return mean if math.isnan(deviation) or not with_spread else f"{mean} ± {deviation:.{column.digits}f}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def p_value(p: float | None) -> str:
    """A probability as tables show it."""
    if p is None or math.isnan(p):
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _without(table: Table, column: int) -> Table:
    keep = [j for j in range(len(table.head)) if j != column]
    bold = frozenset((i, keep.index(j)) for i, j in table.bold if j != column)
    return Table([table.head[j] for j in keep], [[row[j] for j in keep] for row in table.rows], bold)
