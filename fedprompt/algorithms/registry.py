"""Names of methods: those of this package, and those that other packages bring through an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points

from fedprompt.algorithms.base import Algorithm
from fedprompt.errors import InputError, did_you_mean

_ALGORITHMS: dict[str, type[Algorithm]] = {}
ENTRY_POINTS = "fedprompt.algorithms"


def algorithm(name: str, about: str) -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Register a method under the name that ``algorithm.name`` gives, with one line about it."""

    def register(cls: type[Algorithm]) -> type[Algorithm]:
        cls.name, cls.about = name, about
        _ALGORITHMS[name] = cls
        return cls

    return register


@cache
def _load_all() -> None:
    package = importlib.import_module("fedprompt.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"fedprompt.algorithms.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def get(name: str) -> type[Algorithm]:
    """Return the method called ``name``; raises InputError that lists the methods there are."""
    _load_all()
    if name not in _ALGORITHMS:
        raise InputError(
            f"algorithm.name: unknown method '{name}'{did_you_mean(name, _ALGORITHMS)}; "
            f"allowed: {', '.join(sorted(_ALGORITHMS))}"
        )
    return _ALGORITHMS[name]


def available() -> list[type[Algorithm]]:
    """All methods, by name."""
    _load_all()
    return [_ALGORITHMS[name] for name in sorted(_ALGORITHMS)]
