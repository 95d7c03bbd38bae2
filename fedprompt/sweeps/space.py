"""From a sweep file to its trials: complete, checked configurations with names, before anything starts.

The order is the file's: the first key of ``space`` changes slowest, then what is drawn, then the parts under ``when``,
one after the other. The same file gives the same trials, the drawn ones too.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.algorithms import registry
from fedprompt.config.parsing import from_dict, is_path, own_head
from fedprompt.config.schema import AlgorithmSection, Config
from fedprompt.config.settings import checked, put
from fedprompt.config.unknown_keys import KeyOfAnotherMethod
from fedprompt.errors import InputError
from fedprompt.sweeps.sweep_file import Condition, Space, SweepFile, Values, conditions, values
from fedprompt.tracking.runs import flat

DIGITS = 4  # of numbers that are drawn: names and tables stay readable
LONGEST_SLUG = 80
MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Trial:
    """One run of a sweep. ``swept``: what the space gave it, under dotted keys. ``name`` is its folder's, too."""

    number: int
    name: str
    swept: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class _Point:
    """Settings of one trial to be; ``sampled``: it is one of ``samples`` draws."""

    settings: dict[str, Any]
    sampled: bool = False


def expand(sweep: SweepFile) -> list[Trial]:
    """Return all trials in their order. Every trial has one worker where ``runtime.workers`` is left out.

    What was drawn twice is one trial. Raises InputError where a trial's configuration is wrong, two grid points are the
    same, or a condition holds for none.
    """
    chosen: dict[str, tuple[_Point, Config]] = {}
    for point in _points(sweep):
        config = _config(sweep, point.settings)
        if not point.sampled and config.to_yaml() in chosen:
            raise InputError(f"space: {_slug(point.settings)} is there twice; allowed: every value once")
        chosen.setdefault(config.to_yaml(), (point, config))
    width = max(3, len(str(len(chosen) - 1)))
    trials = []
    for number, (point, config) in enumerate(chosen.values()):
        name = f"{number:0{width}d}-{_slug(point.settings)}"
        trials.append(Trial(number, name, point.settings, _placed(config, name)))
    return trials


def swept_keys(trials: list[Trial]) -> list[str]:
    """All keys that the space gives to any trial, in their order."""
    return list(dict.fromkeys(key for trial in trials for key in trial.swept))


def _points(sweep: SweepFile) -> list[_Point]:
    rng = np.random.default_rng(sweep.seed)
    space, parts = values(sweep.space), conditions(sweep)
    if sweep.samples > 1 and not any(v.drawn for s in (space, *(p.space for p in parts)) for v in s.values()):
        raise InputError(f"samples: {sweep.samples}, but nothing in the space is drawn; allowed: 1")
    _check_count(_size(_Point({}), space, sweep.samples))
    points = list(_grown(_Point({}), space, sweep.samples, rng))
    for number, part in enumerate(parts):
        holds = [_holds(part, sweep, point) for point in points]
        if not any(holds) and not any(space[key].drawn for key in part.needs if key in space):
            wanted = ", ".join(f"{key} = {list(options)}" for key, options in part.needs.items())
            raise InputError(f"when[{number}].if: no trial has {wanted}; allowed: a condition that holds for some")
        _check_count(sum(_size(point, part.space, sweep.samples) if hold else 1 for point, hold in zip(points, holds)))
        grown = [
            _grown(point, part.space, sweep.samples, rng) if hold else [point] for point, hold in zip(points, holds)
        ]
        points = list(itertools.chain.from_iterable(grown))
    return points


def _size(point: _Point, space: Space, samples: int) -> int:
    """How many points ``_grown`` makes of one."""
    draws = samples if any(given.drawn for given in space.values()) and not point.sampled else 1
    return draws * math.prod(len(given.values) for given in space.values() if not given.drawn)


def _check_count(trials: int) -> None:
    if trials > MOST_TRIALS:
        raise InputError(f"space: makes {trials:,} trials; allowed: at most {MOST_TRIALS:,} in one sweep")


def _grown(point: _Point, space: Space, samples: int, rng: np.random.Generator) -> Iterator[_Point]:
    """The point with all combinations of the space's grids, each drawn ``samples`` times where it draws at all."""
    grids = {key: given.values for key, given in space.items() if not given.drawn}
    drawn = {key: given for key, given in space.items() if given.drawn}
    draws = samples if drawn and not point.sampled else 1
    for combination in itertools.product(*grids.values()):
        for _ in range(draws):
            chosen = {**dict(zip(grids, combination)), **{key: _draw(given, rng) for key, given in drawn.items()}}
            ordered = {key: chosen[key] for key in space}  # as the file has them
            yield _Point({**point.settings, **ordered}, point.sampled or bool(drawn))


def _draw(given: Values, rng: np.random.Generator) -> Any:
    if given.kind == "choice":
        return given.values[rng.integers(len(given.values))]
    low, high = given.values
    if given.kind == "randint":
        return int(rng.integers(low, high + 1))
    number = np.exp(rng.uniform(np.log(low), np.log(high))) if given.kind == "loguniform" else rng.uniform(low, high)
    return float(np.clip(float(f"{number:.{DIGITS}g}"), low, high))


def _holds(part: Condition, sweep: SweepFile, point: _Point) -> bool:
    """Whether the trial has the wanted values: from the space, else from ``base``, else a configuration's defaults."""
    settings = {**flat(Config().model_dump()), **flat(sweep.base), **point.settings}
    if settings["head.kind"] is None:
        name = checked(AlgorithmSection, {"name": settings["algorithm.name"]}, "algorithm").name
        settings["head.kind"] = own_head(settings["prompt.kind"] or registry.get(name).kinds[0])
    return all(
        key in settings and any(_is_same(settings[key], option) for option in options)
        for key, options in part.needs.items()
    )


def _is_same(value: Any, wanted: Any) -> bool:
    """Whether a setting has a value; true is not 1."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _config(sweep: SweepFile, settings: dict[str, Any]) -> Config:
    tree = deepcopy(sweep.base)
    for key, value in settings.items():
        put(tree, key, value)
    try:
        return from_dict(tree)
    except KeyOfAnotherMethod as error:
        swept = sweep.space.get("algorithm.name", {})
        named = [str(name) for names in swept.values() for name in names] if isinstance(swept, dict) else []
        owner = next((method for method in error.methods if method in named), error.methods[0])
        example = f"if: {{algorithm.name: {owner}}}"
        raise InputError(f"{error}; a key that only some methods have goes below when:, with {example}") from None


def _placed(config: Config, name: str) -> Config:
    """The configuration with the number of workers that its trial asks the cluster for, and storage of its own."""
    runtime = config.runtime
    storage = f"{runtime.storage.rstrip('/')}/{name}" if runtime.storage else None
    placed = runtime.model_copy(update={"workers": runtime.workers or 1, "storage": storage})
    return config.model_copy(update={"runtime": placed})


def _slug(settings: dict[str, Any]) -> str:
    """``alpha0.1-pfpt-seed0``: what a folder can be called."""
    words = []
    for key, value in settings.items():
        last = key.rpartition(".")[2]
        value = Path(value).name if is_path(key) and isinstance(value, str) else value
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(text if last in ("name", "kind") else f"{last}{text}")
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", "-".join(words))[:LONGEST_SLUG].rstrip("-_.")
