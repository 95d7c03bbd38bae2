"""Names of backbones of other packages: ``backbone.name``. What is not here is a name of timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from fedprompt.registry import Registered, Registry

Factory = Callable[[str, int], nn.Module]  # (backbone.weights, backbone.image_size) -> a VisionTransformer of timm's
F = TypeVar("F", bound=Factory)

BACKBONES: Registry[Registered[Factory]] = Registry(
    "backbones", noun="backbone", key="backbone.name", package="fedprompt.models.backbones"
)


def backbone(name: str, about: str, source: str = "") -> Callable[[F], F]:
    """Register ``factory(weights, image_size) -> VisionTransformer`` as ``backbone.name=name``.

    ``about`` is a line about it, ``source`` where it is from. The factory gets ``backbone.weights`` as it stands in the
    configuration; with ``random`` it must need no file. Raises InputError where another factory has the name.
    """

    def register(factory: F) -> F:
        BACKBONES.add(Registered(name, about, source, factory))
        return factory

    return register
