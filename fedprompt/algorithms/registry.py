"""Names of methods: ``algorithm.name``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel

from fedprompt.algorithms.base import Algorithm
from fedprompt.errors import InputError, shown
from fedprompt.registry import AnyOf, Registered, Registry, registry_of

CHOICES = {"kinds": "kinds", "optimizers": "local_rules"}  # attributes of a method that hold names, and their type


def algorithm(name: str, about: str, source: str = "") -> Callable[[type[Algorithm]], type[Algorithm]]:
    """Register a method under the name that ``algorithm.name`` gives, with one line about it, and where it is from.

    Raises InputError where it is no method, or another class has the name.
    """

    def register(cls: type[Algorithm]) -> type[Algorithm]:
        _check_method(cls, name)
        ALGORITHMS.add(Registered(name, about, source, cls))
        cls.name, cls.about, cls.source = name, about, source
        return cls

    return register


def get(name: str) -> type[Algorithm]:
    """Return the method called ``name``; raises InputError that lists the methods there are, and what is broken."""
    return ALGORITHMS.get(name).thing


def available() -> list[type[Algorithm]]:
    """All methods, by name."""
    return [entry.thing for entry in ALGORITHMS.available()]


def _check_method(cls: Any, name: Any) -> None:
    """Raise InputError where a class cannot be a method: then no list of methods would be readable."""
    if not isinstance(cls, type) or not issubclass(cls, Algorithm):
        raise InputError(
            f"@algorithm: found {shown(cls)} under the name {shown(name)}; allowed: a subclass of Algorithm"
        )
    for what in CHOICES:
        words = getattr(cls, what)
        if not isinstance(words, AnyOf) and not _are_names(words):
            raise InputError(f"@algorithm: '{name}' has {what} = {shown(words)}; allowed: a tuple of names")
    if not isinstance(cls.Settings, type) or not issubclass(cls.Settings, BaseModel):
        raise InputError(
            f"@algorithm: '{name}' has Settings = {shown(cls.Settings)}; allowed: a class of MethodSettings"
        )
    if cls.aggregate is Algorithm.aggregate:
        place = f"{cls.__module__}.{cls.__qualname__}"
        raise InputError(f"@algorithm: '{name}' ({place}) has no aggregate; allowed: a method that has one")


def _are_names(words: Any) -> bool:
    return isinstance(words, tuple) and bool(words) and all(isinstance(word, str) for word in words)


def _check_choices(entry: Registered[type[Algorithm]]) -> None:
    """Raise InputError where a method goes with kinds or local rules that do not exist."""
    for what, type in CHOICES.items():
        words: Sequence[str] = getattr(entry.thing, what)
        known = registry_of(type).names()
        if not set(words) <= set(known):
            raise InputError(
                f"@algorithm: '{entry.name}' has {what} = {shown(words)}; allowed: a tuple of some of "
                f"{', '.join(known)}"
            )


ALGORITHMS: Registry[Registered[type[Algorithm]]] = Registry(
    "algorithms", noun="method", key="algorithm.name", package="fedprompt.algorithms", check=_check_choices
)
