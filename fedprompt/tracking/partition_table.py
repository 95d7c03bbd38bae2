"""The client × class table of a partition, as it fits into a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from fedprompt.texts import printable

MOST_CLASSES = 40  # columns that are printed at most
LONGEST_NAME = 12  # characters of a class's name above its column
GAP = 2


def partition_lines(class_counts: np.ndarray, class_names: Sequence[str], width: int) -> list[str]:
    """Return the table of counts [N, K] as lines of at most ``width`` characters, as long as one class fits.

    A last line says how many classes were left out.
    """
    clients = ["client", *map(str, range(len(class_counts)))]
    totals = ["total", *map(str, class_counts.sum(axis=1))]
    room = width - _width(clients) - GAP - _width(totals)
    columns: list[list[str]] = []
    for name, counts in zip(class_names[:MOST_CLASSES], class_counts.T):
        column = [printable(name, LONGEST_NAME), *map(str, counts)]
        room -= GAP + _width(column)
        if columns and room < 0:
            break
        columns.append(column)
    shown = [clients, *columns, totals]
    lines = [(" " * GAP).join(cells) for cells in zip(*(_aligned(column) for column in shown))]
    left_out = class_counts.shape[1] - len(columns)
    if left_out:
        lines.append(f"{left_out} of {len(class_names)} classes are left out; --output DIR writes the whole table")
    return lines


def _aligned(column: Sequence[str]) -> list[str]:
    width = _width(column)
    return [" " * (width - _columns(cell)) + cell for cell in column]


def _width(column: Sequence[str]) -> int:
    return max(map(_columns, column))


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes: two for wide characters, none for those that join the one before."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
