"""Names of heads: ``head.kind``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from fedprompt.models.heads.classifier import Head, HeadOptions
from fedprompt.registry import Registered, Registry

H = TypeVar("H", bound=Head)

HEADS: Registry[Registered[type[Head]]] = Registry(
    "heads", noun="head", key="head.kind", package="fedprompt.models.heads"
)


def head(name: str, about: str, source: str = "") -> Callable[[type[H]], type[H]]:
    """Register a subclass of ``Head`` as ``head.kind=name``, with a line about it, and where it is from.

    Raises InputError where another class has the name.
    """

    def register(cls: type[H]) -> type[H]:
        HEADS.add(Registered(name, about, source, cls))
        return cls

    return register


def make_head(options: HeadOptions, prototypes: Tensor | None = None) -> Head:
    """Return the head that ``options.kind`` names; ``prototypes`` [K, D] where it wants them."""
    return HEADS.get(options.kind).thing(options, prototypes)
