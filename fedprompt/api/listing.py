"""What there is to choose from, as names; other packages' names are among them."""

from __future__ import annotations

from fedprompt.registry import registry_of, tell_broken


def _names(type: str) -> list[str]:
    tell_broken()
    return registry_of(type).names()


def list_algorithms() -> list[str]:
    """Names of the methods, for ``algorithm.name``."""
    return _names("algorithms")


def list_local_rules() -> list[str]:
    """Names of the clients' optimizers, for ``local.optimizer``."""
    return _names("local_rules")


def list_kinds() -> list[str]:
    """Names of what can be trained, for ``prompt.kind``."""
    return _names("kinds")


def list_heads() -> list[str]:
    """Names of the classifiers, for ``head.kind``."""
    return _names("heads")


def list_partitions() -> list[str]:
    """Names of the ways to divide training data among clients, for ``partition.kind``."""
    return _names("partitions")


def list_datasets() -> list[str]:
    """Names of the data sets, for ``data.name``, whether or not their files are present here."""
    return _names("datasets")


def list_trackers() -> list[str]:
    """Names of the trackers, for ``tracking.trackers``."""
    return _names("trackers")


def list_backbones() -> list[str]:
    """Names of backbones that are known to work, for ``backbone.name``; other names of timm work, too."""
    from fedprompt.models.weights.named import available

    return list(dict.fromkeys([*(entry.name for entry in available()), *_names("backbones")]))
