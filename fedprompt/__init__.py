"""Federated prompt tuning of frozen pretrained models, simulated.

Importing this package changes nothing in the process. Its public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprompt.algorithms.registry import algorithm as algorithm
    from fedprompt.api.listing import list_algorithms as list_algorithms
    from fedprompt.api.listing import list_backbones as list_backbones
    from fedprompt.api.listing import list_datasets as list_datasets
    from fedprompt.api.listing import list_heads as list_heads
    from fedprompt.api.listing import list_kinds as list_kinds
    from fedprompt.api.listing import list_local_rules as list_local_rules
    from fedprompt.api.listing import list_partitions as list_partitions
    from fedprompt.api.listing import list_trackers as list_trackers
    from fedprompt.api.models import Model as Model
    from fedprompt.api.running import run as run
    from fedprompt.api.runs import Run as Run
    from fedprompt.api.runs import load_run as load_run
    from fedprompt.api.sweeping import Sweep as Sweep
    from fedprompt.api.sweeping import sweep as sweep
    from fedprompt.client.rules.registry import local_rule as local_rule
    from fedprompt.config.schema import Config as Config
    from fedprompt.data.partitions.registry import partition as partition
    from fedprompt.data.registry import dataset as dataset
    from fedprompt.errors import InputError as InputError
    from fedprompt.errors import RunFailed as RunFailed
    from fedprompt.models.backbones.registry import backbone as backbone
    from fedprompt.models.heads.registry import head as head
    from fedprompt.models.kinds.registry import kind as kind
    from fedprompt.tracking.registry import tracker as tracker

__version__ = "0.2.0"

_PUBLIC = {
    "fedprompt.algorithms.registry": ("algorithm",),
    "fedprompt.api.listing": (
        *("list_algorithms", "list_backbones", "list_datasets", "list_heads", "list_kinds", "list_local_rules"),
        *("list_partitions", "list_trackers"),
    ),
    "fedprompt.api.models": ("Model",),
    "fedprompt.api.running": ("run",),
    "fedprompt.api.runs": ("Run", "load_run"),
    "fedprompt.api.sweeping": ("Sweep", "sweep"),
    "fedprompt.client.rules.registry": ("local_rule",),
    "fedprompt.config.schema": ("Config",),
    "fedprompt.data.partitions.registry": ("partition",),
    "fedprompt.data.registry": ("dataset",),
    "fedprompt.errors": ("InputError", "RunFailed"),
    "fedprompt.models.backbones.registry": ("backbone",),
    "fedprompt.models.heads.registry": ("head",),
    "fedprompt.models.kinds.registry": ("kind",),
    "fedprompt.tracking.registry": ("tracker",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Load a public name where it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedprompt' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
