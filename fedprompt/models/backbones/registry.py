"""Names of backbones that are not timm's: ``backbone.name``. One function with ``@backbone`` each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from fedprompt.models.backbones.base import Backbone
from fedprompt.registry import Registered, Registry


class Factory(Protocol):
    """Makes a backbone; ``weights.named.load_backbone`` says what it is given and must do."""

    def __call__(
        self, weights: str, image_size: int, *, crop: float, device: torch.device, autocast: torch.dtype | None
    ) -> Backbone: ...


F = TypeVar("F", bound=Factory)

BACKBONES: Registry[Registered[Factory]] = Registry(
    "backbones", noun="backbone", key="backbone.name", package="fedprompt.models.backbones"
)


def backbone(name: str, about: str, source: str = "") -> Callable[[F], F]:
    """Register a factory as ``backbone.name=name``, before timm's models.

    ``about`` is a line about it, ``source`` where it is from. Raises InputError where another factory has the name.
    """

    def register(factory: F) -> F:
        BACKBONES.add(Registered(name, about, source, factory))
        return factory

    return register
