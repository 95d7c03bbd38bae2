"""Experiments: runs that are equal but for the seed, under short names made of what varies between them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from fedprompt.errors import InputError
from fedprompt.registry import registry_of
from fedprompt.tracking.runs import LeftOut, Run, flat

SETTING = ("data", "partition", "federation", "backbone")
METHOD = ("algorithm", "prompt", "head", "local", "blackbox")

GAINS = ("c", "offset", "alpha", "gamma", "draws")  # of the zeroth-order rules that estimate a gradient

ZEROTH_ORDER = ("spsa-gc", "spsa", "rgf", "cma")
PROMPTS = ("prompt", "deep", "pool")

# Keys that only matter where another key has one of these values: elsewhere they tell nothing apart.
# With a name from another package they all matter, for nothing is known of it.
ONLY_WHERE: dict[str, tuple[str, tuple[str, ...]]] = {
    "data.root": ("data.name", ("folder",)),
    **dict.fromkeys(
        ("partition.alpha", "partition.min_size", "partition.repair"),
        ("partition.kind", ("dirichlet", "quantity", "domain")),
    ),
    "partition.dominant_share": ("partition.kind", ("dominant",)),
    "partition.shards_per_client": ("partition.kind", ("shards",)),
    "prompt.length": ("prompt.kind", ("prompt", "deep")),
    "prompt.init": ("prompt.kind", PROMPTS),
    "prompt.layer": ("prompt.kind", ("prompt", "deep", "pool", "adapter", "lora")),
    "prompt.rank": ("prompt.kind", ("adapter", "lora")),
    **dict.fromkeys(
        [f"prompt.{key}" for key in ("pool_size", "top_k", "selection", "query", "similarity")],
        ("prompt.kind", ("pool",)),
    ),
    **dict.fromkeys(("prompt.channels", "prompt.strength"), ("prompt.kind", ("visual",))),
    **dict.fromkeys(("head.hidden", "head.dropout"), ("head.kind", ("mlp",))),
    **dict.fromkeys(("head.embeddings", "head.scale"), ("head.kind", ("prototypes",))),
    "local.prompt_lr": ("prompt.kind", ("prompt", "deep", "pool", "adapter", "lora", "full", "visual")),
    **dict.fromkeys(("local.betas", "local.eps"), ("local.optimizer", ("adam",))),
    "local.momentum": ("local.optimizer", ("sgd",)),
    **dict.fromkeys(("blackbox.budget", "blackbox.address"), ("local.optimizer", ZEROTH_ORDER)),
    **dict.fromkeys((f"blackbox.{gain}" for gain in GAINS), ("local.optimizer", ("spsa-gc", "spsa", "rgf"))),
    "blackbox.beta": ("local.optimizer", ("spsa-gc",)),
}
TYPES = {"partition.kind": "partitions", "prompt.kind": "kinds", "head.kind": "heads", "local.optimizer": "local_rules"}


@dataclass(frozen=True, eq=False)
class Group:
    """One experiment: a method in a setting, with a run per seed, ascending."""

    setting: str
    method: str
    family: str  # the method without the rates that tell the trials of a search apart
    rates: str  # what is tuned per method, where it varies between experiments and is no part of the name
    keys: dict[str, Any]  # the settings that count
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The runs' seeds."""
        return tuple(run.seed for run in self.runs)

    @property
    def validation(self) -> float:
        """Mean validation accuracy of the last ten evaluations, by which methods are chosen and ordered."""
        return float(np.mean([run.result["last10"]["validation_accuracy"] for run in self.runs]))


def make_groups(runs: Sequence[Run]) -> tuple[list[Group], list[LeftOut]]:
    """Return the experiments, settings with most seeds first and in each the best on validation first.

    And the runs that repeat another one: the same experiment and seed in a second folder.
    """
    alike: dict[str, dict[int, Run]] = {}
    repeated = []
    for run, keys in zip(runs, _told_apart_by_data(runs)):
        of_experiment = alike.setdefault(json.dumps(keys, sort_keys=True), {})
        first = of_experiment.setdefault(run.seed, run)
        if first is not run:
            repeated.append(LeftOut(run.folder, f"the same experiment and seed as {first.folder}"))
    experiments = [(json.loads(key), [by_seed[seed] for seed in sorted(by_seed)]) for key, by_seed in alike.items()]
    named = _named(experiments)
    order: dict[str, tuple[int, Any]] = {}
    for group in sorted(named, key=lambda group: -len(group.runs)):
        order.setdefault(group.setting, (-len(group.runs), _natural(group.keys)))
    return sorted(named, key=lambda group: (order[group.setting], group.setting, -group.validation)), repeated


def varying(trees: Sequence[dict[str, Any]]) -> list[str]:
    """Keys with different values among the experiments that have them; a method's own keys, within the method."""
    values: dict[tuple[str, str], set[str]] = {}
    for keys in trees:
        for key, value in keys.items():
            own = key.startswith("algorithm.") and key != "algorithm.name"
            values.setdefault((keys["algorithm.name"] if own else "", key), set()).add(repr(value))
    return list(dict.fromkeys(key for (_, key), found in values.items() if len(found) > 1))


def is_rate(key: str) -> bool:
    """Whether the key is a learning rate or a strength that everybody tunes per method: no part of its name."""
    last = key.rpartition(".")[2]
    return last == "mu" or last == "lr" or last.endswith("_lr")


def partition_words(keys: dict[str, Any]) -> str:
    """How the data is divided, in two words."""
    kind = keys.get("partition.kind", "")
    return f"alpha {keys['partition.alpha']:g}" if kind == "dirichlet" else str(kind)


def of_sections(keys: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """The keys below some sections."""
    return {key: value for key, value in keys.items() if key.partition(".")[0] in sections}


@cache
def defaults(algorithm: str) -> dict[str, Any]:
    """The default settings with an algorithm, its own included; none where it is not installed here."""
    from fedprompt.config.parsing import from_dict

    try:
        return flat(from_dict({"algorithm": {"name": algorithm}}).model_dump(mode="json"))
    except InputError:
        return {}


def _relevant(run: Run) -> dict[str, Any]:
    """All settings that count, completed with today's defaults: a run may be older than a key."""
    given = {key: value for key, value in run.settings.items() if value is not None}
    known = {**dict.fromkeys(run.settings), **defaults(run.settings["algorithm.name"]), **given}
    keys = of_sections(known, (*SETTING, *METHOD))
    return {key: value for key, value in keys.items() if key not in ONLY_WHERE or _matters(key, known)}


def _told_apart_by_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The settings that count of each run, with what tells its data apart.

    Equal data in two folders is the same data, under the name of the first. Unequal data under one name is told apart
    by its digest, "unknown" in results of version 0.1.0.
    """
    settings, digests = [_relevant(run) for run in runs], [_digest(run) for run in runs]
    roots: dict[str, str] = {}
    for keys, digest in zip(settings, digests):
        if digest is not None and keys.get("data.root") is not None:
            keys["data.root"] = roots.setdefault(digest, keys["data.root"])
    of_name: dict[tuple[Any, Any], set[str | None]] = {}
    for keys, digest in zip(settings, digests):
        of_name.setdefault(_data_name(keys), set()).add(digest)
    for keys, digest in zip(settings, digests):
        if len(of_name[_data_name(keys)] - {None}) > 1:
            keys["data.digest"] = "unknown" if digest is None else digest[:8]
    return settings


def _digest(run: Run) -> str | None:
    return (run.result.get("data") or {}).get("digest")


def _data_name(keys: dict[str, Any]) -> tuple[Any, Any]:
    return keys["data.name"], keys.get("data.root")


def _matters(key: str, known: dict[str, Any]) -> bool:
    other, values = ONLY_WHERE[key]
    found = known.get(other)
    return found in values or (other in TYPES and found is not None and found not in _our_names(TYPES[other]))


@cache
def _our_names(type: str) -> frozenset[str]:
    """Names of a type that come with fedprompt."""
    return frozenset(entry.name for entry in registry_of(type).available() if entry.is_ours)


def _named(experiments: Sequence[tuple[dict[str, Any], list[Run]]]) -> list[Group]:
    vary = varying([keys for keys, _ in experiments])
    rates = [key for key in vary if is_rate(key)]
    bare = [(_setting_name(keys, vary), _method_name(keys, vary)) for keys, _ in experiments]
    groups = []
    for (setting, method), (keys, runs) in zip(bare, experiments):
        # Trials of a search: the same method several times in a setting, told apart by its rates alone.
        trials = [other for name, (other, _) in zip(bare, experiments) if name == (setting, method)]
        searched = [key for key in rates if len({repr(other.get(key)) for other in trials}) > 1]
        name = ", ".join([method, *_rate_words(keys, searched)])
        told = ", ".join(_rate_words(keys, [key for key in rates if key not in searched]))
        groups.append(Group(setting, name, method, told, keys, tuple(runs)))
    return groups


def _setting_name(keys: dict[str, Any], vary: list[str]) -> str:
    of_setting = [key for key in of_sections(dict.fromkeys(vary), SETTING) if key in keys]
    words = [str(keys["data.name"])] if not of_setting or "data.name" in of_setting else []
    if not of_setting or any(key in of_setting for key in ("partition.kind", "partition.alpha")):
        words.append(partition_words(keys))
    told = ("data.name", "partition.kind", *(["partition.alpha"] if keys.get("partition.kind") == "dirichlet" else []))
    for key in (key for key in of_setting if key not in told):
        last = key.rpartition(".")[2]
        counted = key in ("federation.clients", "federation.rounds")
        words.append(f"{keys[key]} {last}" if counted else f"{last} {_text(keys[key])}")
    return ", ".join(words)


def _method_name(keys: dict[str, Any], vary: list[str]) -> str:
    usual = defaults(keys["algorithm.name"])
    words = [keys["algorithm.name"]]
    for key in of_sections(dict.fromkeys(vary), METHOD):
        if key == "algorithm.name" or is_rate(key) or key not in keys or usual.get(key, ...) == keys[key]:
            continue
        section, _, last = key.partition(".")
        value = keys[key]
        if value is True:
            words.append({"head.personal": "personal heads"}.get(key, last))
        elif isinstance(value, str):
            words.append({"head": f"{value} head", "local": f"local {value}"}.get(section, value))
        else:
            words.append(f"{last} {_text(value)}")
    return ", ".join(words)


def _rate_words(keys: dict[str, Any], rates: list[str]) -> list[str]:
    return [f"{key.partition('.')[2]} {_text(keys[key])}" for key in rates if key in keys]


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(keys: dict[str, Any]) -> list[tuple[bool, float, str]]:
    """Sort key: numbers by size, and before words."""
    found = of_sections(keys, SETTING)
    values = [found[key] for key in sorted(found, key=lambda key: (SETTING.index(key.partition(".")[0]), key))]
    return [(isinstance(v, str), float(v) if isinstance(v, (int, float)) else 0.0, str(v)) for v in values]
