"""The sweep file: one YAML file that says which trials a sweep is made of, checked before any of them starts.

about: one line
base: {federation: {rounds: 20}, partition.kind: dirichlet}   # a configuration, nested or with dotted keys
space:                                                        # any key of a configuration
  partition.alpha: {grid: [0.1, 0.5, 5]}
  algorithm.name: {grid: [pfpt, fedavg]}
  local.lr: {loguniform: [1e-4, 1e-2]}                        # drawn; also uniform, randint, choice
when:                                                         # parts for some of the trials only
  - if: {algorithm.name: pfpt}                                # a value, or a list of values of which one must hold
    space: {algorithm.schedule: {grid: [sequential, joint]}}
samples: 1             # how often each point of the grid is drawn, where the space has parts that are drawn
seed: 0                # of what is drawn; runs have their own (key `seed` of the configuration)
scheduler: none        # or asha, median: stop trials early that do badly on the validation split
grace_rounds: null     # rounds in which no trial is stopped; left out: 5
reduction: null        # asha: of so many trials one goes on at each rung; left out: 3
max_concurrent: null   # trials at the same time; left out: as many as the cluster carries
personalize: {lr: [0.001, 0.01]}   # after every run, as `fedprompt personalize` would; left out: not at all
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedprompt.config import yaml_text
from fedprompt.config.parsing import made_absolute
from fedprompt.config.schema import Config, Section
from fedprompt.config.settings import apply, checked, put
from fedprompt.errors import InputError, did_you_mean, shown
from fedprompt.personalization.personalize import settings_of
from fedprompt.tracking.runs import flat

LISTS, RANGES = ("grid", "choice"), ("uniform", "loguniform", "randint")
LARGEST = 2**62  # of whole numbers that are drawn


class SweepFile(Section):
    """A sweep as its file has it; ``values`` and ``conditions`` read ``space`` and ``when``."""

    about: str = ""
    base: dict[str, Any] = Field(default_factory=dict)
    space: dict[str, Any]
    when: list[dict[str, Any]] = Field(default_factory=list)
    samples: int = Field(1, gt=0, le=10_000)
    seed: int = Field(0, ge=0, lt=2**63)
    scheduler: Literal["none", "asha", "median"] = "none"
    grace_rounds: int | None = Field(None, gt=0, le=999_999)
    reduction: float | None = Field(None, gt=1, le=1e6)
    max_concurrent: int | None = Field(None, gt=0, le=1_000_000)
    personalize: dict[str, Any] | None = None

    def to_yaml(self) -> str:
        """The complete sweep, as a file that ``read`` reads back to an equal object."""
        return yaml_text.dump(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Values:
    """What one key of the space takes: the values of ``grid`` or ``choice``, or the two ends of a range."""

    kind: str
    values: tuple[Any, ...]

    @property
    def drawn(self) -> bool:
        """Whether a generator picks from them."""
        return self.kind != "grid"


Space = dict[str, Values]


@dataclass(frozen=True)
class Condition:
    """A part of the space that is only there where every key of ``needs`` has one of its values."""

    needs: dict[str, tuple[Any, ...]]
    space: Space


def read(path: Path, overrides: Sequence[str] = ()) -> SweepFile:
    """Read a sweep file and put ``key=value`` overrides into its ``base``.

    Raises InputError with one line that names the file and the key.
    """
    tree = _tree(path)
    with naming(path):
        sweep = checked(SweepFile, tree)
        space, swept = values(sweep.space), set(sweep.space)
        for condition in conditions(sweep):
            swept |= condition.space.keys()
        if sweep.personalize is not None:
            settings_of(sweep.personalize)
        if not space:
            raise InputError("space: is empty; allowed: at least one key, such as seed: {grid: [0, 1, 2]}")
        sweep = sweep.model_copy(update=_with_absolute_paths(sweep))
        base = sweep.base
    for override in overrides:
        key = apply(base, override)
        if key in swept:
            raise InputError(f"{key}: {path} varies it, so it cannot be given here; allowed: any other key")
    sweep = sweep.model_copy(update={"base": _absolute_values(base)})
    with naming(path):
        _check_scheduler(sweep)
    return sweep


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an InputError from inside begin with the sweep file's name."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def values(space: dict[str, Any], place: str = "space") -> Space:
    """Read ``{key: {grid: […]}}``."""
    return {str(key): _values(f"{place}.{key}", given) for key, given in space.items()}


def conditions(sweep: SweepFile) -> list[Condition]:
    """Read the parts under ``when``."""
    return [_condition(f"when[{number}]", given) for number, given in enumerate(sweep.when)]


def _tree(path: Path) -> dict[str, Any]:
    tree = yaml_text.read(path, "sweep file")
    if not isinstance(tree, dict):
        raise InputError(f"{path}: found {shown(tree)}; allowed: the keys {', '.join(SweepFile.model_fields)}")
    return {key: value for key, value in tree.items() if value is not None}


def _absolute(key: str, value: Any) -> Any:
    """What stands under a dotted key, with all paths in it absolute: a value, a list of them, or keys below it."""
    if isinstance(value, dict):
        return {name: _absolute(f"{key}.{name}", below) for name, below in value.items()}
    if isinstance(value, list):
        return [made_absolute(key, one) for one in value]
    return made_absolute(key, value)


def _absolute_values(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: _absolute(key, value) for key, value in settings.items()}


def _absolute_space(space: dict[str, Any]) -> dict[str, Any]:
    return {key: {kind: _absolute(key, found) for kind, found in given.items()} for key, given in space.items()}


def _with_absolute_paths(sweep: SweepFile) -> dict[str, Any]:
    """The parts of a sweep that hold settings: ``base`` nested, and paths absolute wherever one is given."""
    when = [{"if": _absolute_values(part["if"]), "space": _absolute_space(part["space"])} for part in sweep.when]
    return {"base": _nested(sweep.base), "space": _absolute_space(sweep.space), "when": when}


def _nested(base: dict[str, Any]) -> dict[str, Any]:
    """Dotted and nested keys as one nested configuration."""
    tree: dict[str, Any] = {}
    settings = [setting for key, value in base.items() for setting in flat({key: value}).items()]
    for key, value in settings:
        if sum(key == other for other, _ in settings) > 1:
            raise InputError(f"base: {key} is there twice, with a dot and nested; allowed: once")
        if value is not None or key not in Config.model_fields or key == "seed":  # not a section with nothing in it
            put(tree, key, value)
    return tree


def _values(place: str, given: Any) -> Values:
    kinds = (*LISTS, *RANGES)
    if not isinstance(given, dict) or len(given) != 1:
        example = "{grid: [0.1, 0.5]}"
        raise InputError(f"{place}: found {shown(given)}; allowed: {', '.join(kinds)} with values, as in {example}")
    ((kind, found),) = given.items()
    if kind not in kinds:
        raise InputError(f"{place}: unknown kind '{kind}'{did_you_mean(str(kind), kinds)}; allowed: {', '.join(kinds)}")
    place = f"{place}.{kind}"
    if kind in LISTS:
        if not isinstance(found, list) or not found:
            raise InputError(f"{place}: found {shown(found)}; allowed: a list of values in brackets")
        return Values(kind, tuple(found))
    ends = list(found) if isinstance(found, list) else []
    numbers = [end for end in ends if isinstance(end, int if kind == "randint" else (int, float))]
    numbers = [end for end in numbers if not isinstance(end, bool) and abs(end) <= LARGEST]
    least = 0 if kind == "loguniform" else -math.inf
    if len(ends) != 2 or numbers != ends or not least < ends[0] < ends[1]:
        what = {"randint": "whole numbers", "loguniform": "numbers above 0"}.get(kind, "numbers")
        raise InputError(f"{place}: found {shown(found)}; allowed: [lowest, highest], two {what}, smaller first")
    return Values(kind, tuple(ends))


def _condition(place: str, given: dict[str, Any]) -> Condition:
    for key in given:
        if key not in ("if", "space"):
            raise InputError(f"{place}.{key}: unknown key{did_you_mean(str(key), ('if', 'space'))}; allowed: if, space")
    for key in ("if", "space"):
        if not isinstance(given.get(key), dict) or not given[key]:
            raise InputError(f"{place}.{key}: found {shown(given.get(key))}; allowed: keys of a configuration below it")
    known = flat(Config().model_dump())
    for key in given["if"]:
        if key not in known and not str(key).startswith("algorithm."):
            raise InputError(f"{place}.if.{key}: unknown key{did_you_mean(str(key), known)}; allowed: keys of runs")
    needs = {key: tuple(wanted if isinstance(wanted, list) else [wanted]) for key, wanted in given["if"].items()}
    return Condition(needs, values(given["space"], f"{place}.space"))


def _check_scheduler(sweep: SweepFile) -> None:
    for key, where in (("grace_rounds", ("asha", "median")), ("reduction", ("asha",))):
        if getattr(sweep, key) is not None and sweep.scheduler not in where:
            raise InputError(
                f"{key}: {getattr(sweep, key)} means nothing with scheduler = '{sweep.scheduler}'; allowed: leave it "
                f"out, or scheduler: {' or '.join(where)}"
            )
