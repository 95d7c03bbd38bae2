"""Names of methods: those of this package, and those that other packages bring through an entry point."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from pydantic import BaseModel

from fedprompt.algorithms.base import Algorithm
from fedprompt.data import registry as data
from fedprompt.errors import InputError, did_you_mean, shown

_ALGORITHMS: dict[str, type[Algorithm]] = {}
_BROKEN: list[str] = []  # a line about each package, or entry point of one, that cannot be used
_NAME = re.compile(r"[\w.-]+")
ENTRY_POINTS = "fedprompt.algorithms"


def algorithm(name: str, about: str, source: str = "") -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Register a method under the name that ``algorithm.name`` gives, with one line about it, and where it is from.

    Raises InputError where it is no method, or another class has the name.
    """

    def register(cls: type[Algorithm]) -> type[Algorithm]:
        _check_method(cls, name, about, source)
        # A module that is loaded again, or a notebook's cell, may define its own class anew.
        new, old = _place(cls), _place(_ALGORITHMS.get(name, cls))
        if new != old:
            raise InputError(
                f"algorithm.name: '{name}' is registered twice, by {old} and by {new}; "
                "allowed: one method of a name; rename one, or uninstall its package"
            )
        cls.name, cls.about, cls.source = name, about, source
        _ALGORITHMS[name] = cls
        return cls

    return register


def _check_method(cls: Any, name: Any, about: Any, source: Any) -> None:
    """Raise InputError where a class cannot be a method of that name: then no list of methods would be readable."""
    if not isinstance(cls, type) or not issubclass(cls, Algorithm):
        raise InputError(
            f"@algorithm: found {shown(cls)} under the name {shown(name)}; allowed: a subclass of Algorithm"
        )
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"@algorithm: {_place(cls)} has the name {shown(name)}; allowed: letters, digits, '-', '_', '.'"
        )
    for what, line in (("line about it", about), ("source", source)):
        if not isinstance(line, str) or len(line.splitlines()) > 1:
            raise InputError(f"@algorithm: '{name}' has the {what} {shown(line)}; allowed: a text of one line")
    for what in ("kinds", "optimizers"):
        words = getattr(cls, what)
        if not isinstance(words, tuple) or not words or not set(words) <= set(getattr(Algorithm, what)):
            allowed = ", ".join(getattr(Algorithm, what))
            raise InputError(f"@algorithm: '{name}' has {what} = {shown(words)}; allowed: a tuple of some of {allowed}")
    if not isinstance(cls.Settings, type) or not issubclass(cls.Settings, BaseModel):
        raise InputError(
            f"@algorithm: '{name}' has Settings = {shown(cls.Settings)}; allowed: a class of MethodSettings"
        )
    if cls.aggregate is Algorithm.aggregate:
        raise InputError(f"@algorithm: '{name}' ({_place(cls)}) has no aggregate; allowed: a method that has one")


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _load_all() -> None:
    package = importlib.import_module("fedprompt.algorithms")
    for module in pkgutil.walk_packages(package.__path__, "fedprompt.algorithms."):
        importlib.import_module(module.name)
    _BROKEN.clear()
    ours = [found for found in distributions() if f"[{ENTRY_POINTS}]" in (found.read_text("entry_points.txt") or "")]
    for distribution in {found.name: found for found in reversed(ours)}.values():  # the first of a name
        _load_package(distribution)


def _load_package(distribution: Distribution) -> None:
    """Import what a package names under our entry points; one that is broken is noted and brings nothing."""
    try:
        entries = distribution.entry_points.select(group=ENTRY_POINTS)
    except Exception as error:  # of a file with other lines than entry points
        _BROKEN.append(f"entry points of package '{distribution.name}' cannot be read: {_reason(error)}")
        return
    for entry in entries:
        methods, data_sets = dict(_ALGORITHMS), dict(data.registered())
        try:
            _check_entry(entry, entry.load())
        except (Exception, SystemExit) as error:
            _ALGORITHMS.clear()
            _ALGORITHMS.update(methods)
            data.restore(data_sets)
            _BROKEN.append(
                f"entry point '{entry.name} = {entry.value}' of package '{distribution.name}' cannot be loaded: "
                f"{_reason(error)}"
            )


def _check_entry(entry: EntryPoint, found: Any) -> None:
    """Raise InputError where an entry point names a thing in a module that is neither a method nor a data set."""
    loaders = [known.loader for known in data.registered().values()]
    if entry.attr and not any(found is known for known in [*_ALGORITHMS.values(), *loaders]):
        raise InputError(
            f"found {shown(found)}; allowed: a module, or what @algorithm or @dataset has registered there"
        )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


@cache
def tell_broken() -> None:
    """Say once, a line each on standard error, which packages are broken and left out.

    Whoever reads a configuration or lists methods calls it; workers do not, so that a run says it once.
    """
    _load_all()
    for line in _BROKEN:
        print(f"fedprompt: {line}; going on without it, repair the package or uninstall it", file=sys.stderr)


def get(name: str) -> type[Algorithm]:
    """Return the method called ``name``; raises InputError that lists the methods there are, and what is broken."""
    _load_all()
    if name not in _ALGORITHMS:
        raise InputError(
            f"algorithm.name: unknown method {shown(name)}{did_you_mean(name, _ALGORITHMS)}; "
            f"allowed: {', '.join(sorted(_ALGORITHMS))}{''.join(f'; {line}' for line in _BROKEN)}"
        )
    return _ALGORITHMS[name]


def available() -> list[type[Algorithm]]:
    """All methods, by name."""
    _load_all()
    return [_ALGORITHMS[name] for name in sorted(_ALGORITHMS)]
