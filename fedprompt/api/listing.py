"""What there is to choose from, as names."""

from __future__ import annotations


def list_algorithms() -> list[str]:
    """Names of the methods, for ``algorithm.name``."""
    from fedprompt.algorithms import registry

    registry.tell_broken()
    return [method.name for method in registry.available()]


def list_datasets() -> list[str]:
    """Names of the data sets, for ``data.name``, whether or not their files are present here."""
    from fedprompt.algorithms import registry
    from fedprompt.data import available

    registry.tell_broken()
    return [info.name for info in available()]


def list_backbones() -> list[str]:
    """Names of the backbones that are known to work, for ``backbone.name``; other names of timm work, too."""
    from fedprompt.models.weights.named import available

    return list(dict.fromkeys(entry.name for entry in available()))
