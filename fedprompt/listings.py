"""What there is to choose from, in columns, for every type that has a registry."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

from fedprompt import registry

Rows = list[tuple[str, ...]]
_QUOTED = re.compile(r'(\S+ ){0,2}"[^"]*"')  # with the program and the option before it


def listing(type: str) -> Rows:
    """Everything of a type, one of ``registry.TYPES``; packages that cannot be loaded are told on standard error."""
    registry.tell_broken()
    more = {"algorithms": algorithms, "datasets": datasets, "backbones": backbones, "local_rules": local_rules}
    return more[type]() if type in more else others(type)


def others(type: str) -> Rows:
    """Names, a line about each, and where they are from."""
    rows: Rows = []
    for entry in registry.registry_of(type).available():
        rows += [(entry.name, entry.about), *_source(entry)]
    return rows


def local_rules() -> Rows:
    """The local rules: what they are, where they are from, what they need and their rates."""
    from fedprompt.client.rules.registry import LOCAL_RULES

    rows: Rows = []
    for rule in LOCAL_RULES.available():
        needs = "" if rule.needs_gradients else "; needs no gradients: clients ask a black-box model"
        rates = f"local.lr={rule.lr:g} local.prompt_lr={rule.prompt_lr:g}"
        rows += [(rule.name, f"{rule.about}{needs}"), *_source(rule), (rates,)]
    return rows


def algorithms() -> Rows:
    """The methods: what they are, where they are from, what they train and their settings."""
    from fedprompt.algorithms.registry import available

    rows: Rows = []
    for method in available():
        fields = method.Settings.model_fields.items()
        settings = [f"algorithm.{n}={'...' if f.is_required() else f.get_default()}" for n, f in fields]
        more = method.source, f"prompt.kind={'|'.join(method.kinds)}", " ".join(settings)
        rows += [(method.name, method.about), *((line,) for line in more if line)]
    return rows


def datasets() -> Rows:
    """The data sets, whether they are present here, and how to get them."""
    from fedprompt.data import available

    rows: Rows = []
    for info in available():
        rows += [(info.name, _state(info.present), info.about), *_how(info.present, info.get)]
    return rows


def backbones() -> Rows:
    """Pretrained backbones, whether their weights are present here, and how to get them."""
    from fedprompt.models.backbones.registry import BACKBONES
    from fedprompt.models.weights.named import available

    rows: Rows = []
    for entry in available():
        rows += [(entry.name, entry.weights, _state(entry.present)), (entry.about,), *_how(entry.present, entry.how)]
    for own in BACKBONES.available():
        rows += [(own.name, "its own", "present"), (own.about,), *_source(own)]
    return rows


def show(rows: Rows, indent: int | None = None) -> None:
    """Print a table."""
    for line in columns(rows, indent):
        click.echo(line)


def columns(rows: Sequence[tuple[str, ...]], indent: int | None = None, width: int | None = None) -> Iterator[str]:
    """Lines of a table whose columns are as wide as they must be; what is in double quotes stays on one line.

    Args:
        rows: texts of the columns; a row of one text continues the row above it.
        indent: where such a row begins; left out: below the last column.
        width: to break lines at; left out: the terminal's, and none where there is no terminal.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    whole = [row[:-1] for row in rows if len(row) > 1]
    sizes = [max(map(len, column)) + 2 for column in zip(*whole, strict=True)]
    below = " " * (sum(sizes) if indent is None else indent)
    for *before, last in rows:
        start = "".join(cell.ljust(size) for cell, size in zip(before, sizes, strict=False)) or below
        kept = _QUOTED.sub(lambda found: found[0].replace(" ", "\0"), last)
        wrap = textwrap.TextWrapper(width, start, below, break_long_words=False, break_on_hyphens=False)
        yield from (line.replace("\0", " ") for line in wrap.wrap(kept) or [start])


def _source(entry: registry.Registered[Any]) -> Rows:
    return [(entry.source,)] if entry.source else []


def _state(present: bool) -> str:
    return "present" if present else "absent"


def _how(present: bool, how: str) -> Rows:
    return [] if present else [(f"get it: {how}",)]
