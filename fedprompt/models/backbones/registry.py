"""Backbones by name that are not timm's: one function with ``@backbone`` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone


class Factory(Protocol):
    """Makes a backbone; ``weights.named.load_backbone`` says what it is given and must do."""

    def __call__(
        self, weights: str, image_size: int, *, crop: float, device: torch.device, autocast: torch.dtype | None
    ) -> Backbone: ...


@dataclass(frozen=True)
class Registered:
    """A backbone of this registry: a line about it, and what makes it."""

    about: str
    make: Factory


_BACKBONES: dict[str, Registered] = {}


def backbone(name: str, about: str) -> Callable[[Factory], Factory]:
    """Register a factory as ``backbone.name=name``, before timm's models; InputError where the name is taken."""

    def register(make: Factory) -> Factory:
        if name in _BACKBONES and _BACKBONES[name].make is not make:
            raise InputError(f"backbone.name: '{name}' is registered twice; allowed: one backbone of a name")
        _BACKBONES[name] = Registered(about, make)
        return make

    return register


def registered() -> dict[str, Registered]:
    """All of them, by name."""
    return _BACKBONES
