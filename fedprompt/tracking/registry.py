"""Names of trackers: ``tracking.trackers``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedprompt.registry import Registered, Registry
from fedprompt.tracking.tracker import Tracker

T = TypeVar("T", bound=Tracker)

TRACKERS: Registry[Registered[type[Tracker]]] = Registry(
    "trackers", noun="tracker", key="tracking.trackers", package="fedprompt.tracking.trackers"
)


def tracker(name: str, about: str, source: str = "") -> Callable[[type[T]], type[T]]:
    """Register a subclass of ``Tracker`` under the name that ``tracking.trackers`` gives, with a line about it.

    Raises InputError where another class has the name.
    """

    def register(cls: type[T]) -> type[T]:
        TRACKERS.add(Registered(name, about, source, cls))
        return cls

    return register
