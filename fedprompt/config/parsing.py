"""From a YAML file, then dotted overrides, then the defaults, to one checked configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from fedprompt.algorithms import registry
from fedprompt.client.rules.registry import LOCAL_RULES
from fedprompt.config import yaml_text
from fedprompt.config.checks import check
from fedprompt.config.paths import PathKind
from fedprompt.config.schema import AlgorithmSection, Config, LocalSection, TrackingSection
from fedprompt.config.settings import apply, checked
from fedprompt.config.unknown_keys import check_method_keys, did_you_mean
from fedprompt.errors import InputError, shown
from fedprompt.models.kinds.registry import KINDS
from fedprompt.registry import tell_broken

if TYPE_CHECKING:
    from fedprompt.algorithms.base import Algorithm

TENSORBOARD = "tensorboard"  # the tracker that has a key of its own


def load(path: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a configuration file (all defaults without one), apply ``key.path=value`` overrides and check the whole.

    Raises InputError with one line that names the key, the value and what is allowed.
    """
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides:
        apply(tree, override)
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Check a nested dict of settings and complete it with the defaults, the algorithm's own included."""

    def hint(name: str, beside: list[str]) -> str:
        return did_you_mean(name, beside, Config)

    config = checked(Config, tree, hint=hint)
    algorithm = registry.get(config.algorithm.name)
    tell_broken()
    check_method_keys(algorithm, list(config.algorithm.settings))
    settings = checked(algorithm.Settings, config.algorithm.settings, "algorithm", hint)
    kind = config.prompt.kind or algorithm.kinds[0]
    complete = {
        "algorithm": AlgorithmSection(name=config.algorithm.name, **settings.model_dump()),
        "prompt": config.prompt.model_copy(update={"kind": kind}),
        "local": _complete_local(config.local, algorithm, kind),
        "head": config.head.model_copy(update={"kind": config.head.kind or own_head(kind)}),
        "tracking": _complete_tracking(config.tracking),
    }
    config = config.model_copy(update=complete)
    check(config, algorithm)
    return config


def _complete_local(local: LocalSection, algorithm: type[Algorithm], kind: str) -> LocalSection:
    """Fill in the optimizer, its settings and the rates that were left out."""
    optimizer = local.optimizer or algorithm.optimizers[0]
    rule = LOCAL_RULES.get(optimizer)
    lr, prompt_lr = KINDS.get(kind).rates.get(optimizer, (rule.lr, rule.prompt_lr))
    rates = {"lr": local.lr or lr, "prompt_lr": local.prompt_lr or prompt_lr}
    own = {name: getattr(algorithm, name) for name in ("momentum", "rho") if getattr(local, name) is None}
    return local.model_copy(update={"optimizer": optimizer, **rates, **own})


def _complete_tracking(tracking: TrackingSection) -> TrackingSection:
    """Let ``trackers`` say all: what ``tensorboard`` adds or takes away is in it."""
    if tracking.tensorboard is None:
        return tracking
    others = tuple(name for name in tracking.trackers if name != TENSORBOARD)
    trackers = (*others, TENSORBOARD) if tracking.tensorboard else others
    return tracking.model_copy(update={"trackers": trackers, "tensorboard": None})


def is_path(key: str) -> bool:
    """Whether the setting under a dotted key is a path."""
    return bool(_path_kinds(key))


def made_absolute(key: str, value: Any) -> Any:
    """Return a setting as ``from_dict`` would take it where it is a path, else as it is. Raises InputError."""
    for kind in _path_kinds(key) if isinstance(value, str) else ():
        try:
            value = kind.absolute(value)
        except PydanticCustomError as error:
            raise InputError(f"{key}: found {shown(value)}; allowed: {error.message()}") from None
    return value


def _path_kinds(key: str) -> list[PathKind]:
    """How the value under a dotted key is made absolute; empty where it is no path."""
    section, _, name = key.partition(".")
    models = [method.Settings for method in registry.available()] if section == "algorithm" else []
    if section in Config.model_fields and isinstance(Config.model_fields[section].default, BaseModel):
        models.append(type(Config.model_fields[section].default))
    fields = (model.model_fields[name] for model in models if name in model.model_fields)
    return [mark for field in fields for mark in field.metadata if isinstance(mark, PathKind)][:1]


def own_head(prompt_kind: str) -> str:
    """``head.kind`` where it is left out."""
    return KINDS.get(prompt_kind).head


def _read(path: Path) -> dict[str, Any]:
    tree = yaml_text.read(path, "configuration file")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: found a {type(tree).__name__}; allowed: sections such as 'federation:' with keys below"
        )
    sections = {name for name, field in Config.model_fields.items() if name != "seed"}
    return {key: {} if value is None and key in sections else value for key, value in tree.items()}
