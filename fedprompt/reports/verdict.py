"""What a sweep came to, for the terminal: every method at every level of heterogeneity, and the best one at each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedprompt.reports.groups import Group, make_groups
from fedprompt.reports.tables import COLUMNS, written
from fedprompt.tracking.runs import find
from fedprompt.wording import counted

HEAD = ("setting", "method", "seeds", "validation", "test, last ten")


def verdict(folder: Path) -> str:
    """Return the accuracies of the finished runs below ``folder`` in percent, mean ± deviation over seeds, as lines.

    The best method of a setting is the one with the highest mean on the validation split, among the methods with the
    most seeds: a mean of fewer may be high because its seeds are easy.
    """
    groups, _ = make_groups(find([folder])[0])
    if not groups:
        return "no trial has finished"
    rows = [(group.setting, group.method, str(len(group.runs)), *_scores(group)) for group in groups]
    settings = {group.setting: [g for g in groups if g.setting == group.setting] for group in groups}
    return "\n".join([*_aligned([HEAD, *rows]), *(_best(of_setting) for of_setting in settings.values())])


def _scores(group: Group) -> tuple[str, str]:
    return written(group, COLUMNS["validation"]), written(group, COLUMNS["last10"])


def _best(groups: Sequence[Group]) -> str:
    most = max(len(group.runs) for group in groups)
    compared = [group for group in groups if len(group.runs) == most]
    best = max(compared, key=lambda group: group.validation)
    of = f"of {len(compared)} methods" if len(compared) > 1 else "the only method"
    seeds = counted(most, "seed")
    validation, test = _scores(best)
    return f"best on validation, {best.setting}: {best.method}, {of} with {seeds}: {validation} %, test {test} %"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
