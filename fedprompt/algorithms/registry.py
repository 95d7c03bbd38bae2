"""Names of methods: those of this package, and those that other packages bring through an entry point."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fedprompt.algorithms.base import Algorithm
from fedprompt.errors import InputError, did_you_mean, shown

_ALGORITHMS: dict[str, type[Algorithm]] = {}
ENTRY_POINTS = "fedprompt.algorithms"


def algorithm(name: str, about: str, source: str = "") -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Register a method under the name that ``algorithm.name`` gives, with one line about it, and where it is from.

    Raises InputError where another class has the name.
    """

    def register(cls: type[Algorithm]) -> type[Algorithm]:
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


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def _load_all() -> None:
    package = importlib.import_module("fedprompt.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"fedprompt.algorithms.{module.name}")
    for entry in entry_points(group=ENTRY_POINTS):
        _load(entry)


def _load(entry: EntryPoint) -> None:
    """Import another package's module; whatever goes wrong in there is that package's, and told in one line."""
    try:
        entry.load()
    except InputError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"entry point '{entry.name} = {entry.value}' of package '{entry.dist.name}' cannot be loaded: {what}; "
            "repair the package or uninstall it"
        ) from error


def get(name: str) -> type[Algorithm]:
    """Return the method called ``name``; raises InputError that lists the methods there are."""
    _load_all()
    if name not in _ALGORITHMS:
        raise InputError(
            f"algorithm.name: unknown method {shown(name)}{did_you_mean(name, _ALGORITHMS)}; "
            f"allowed: {', '.join(sorted(_ALGORITHMS))}"
        )
    return _ALGORITHMS[name]


def available() -> list[type[Algorithm]]:
    """All methods, by name."""
    _load_all()
    return [_ALGORITHMS[name] for name in sorted(_ALGORITHMS)]
