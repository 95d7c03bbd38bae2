"""What reports read of a run's files, checked: a file that was damaged or edited is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedprompt.errors import InputError
from fedprompt.texts import printable
from fedprompt.tracking import metrics

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    """A part of a file, of which only these keys are checked; numbers are numbers, and no text is taken for one."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


class _Scores(_Part):
    accuracy: Share
    validation_accuracy: Share
    client_mean_accuracy: Share | None = None
    client_worst_decile_accuracy: Share | None = None
    client_own_head_global_accuracy: Share | None = None
    client_averaged_head_global_accuracy: Share | None = None


class _Clients(_Part):
    accuracies: list[Share | None] | None = None


class _Sent(_Part):
    up_bytes: Amount = 0
    down_bytes: Amount = 0
    full_model_bytes: Amount = 0


class _Total(_Part):
    total: Amount = 0


class _Data(_Part):
    digest: str


class _Result(_Part):
    """``result.json``."""

    rounds: int = Field(gt=0)
    final: _Scores
    best: _Scores
    last10: _Scores
    clients: _Clients
    communication: _Sent
    seconds: _Total
    versions: dict[str, str | None]
    data: _Data | None = None  # results of version 0.1.0 have none


class _Line(_Part):
    """What is added up over the lines of ``metrics.jsonl``, whose form ``metrics.read`` has checked."""

    communication: _Sent = _Sent()
    seconds: _Total = _Total()


class _Point(_Part):
    personal_accuracy: Share
    robust_accuracy: Share
    lr: float | None = None
    epoch: float | None = None


class _Personal(_Part):
    """``personalize/result.json``."""

    start: _Point | None = None
    most_personal: _Point | None = None
    balanced: _Point | None = None
    interpolated: _Point | None = None


Model = TypeVar("Model", bound=BaseModel)


def read_result(path: Path) -> dict[str, Any]:
    """Return a run's ``result.json``. Raises InputError where it is damaged, or holds no number where one is needed."""
    return _checked(_Result, _json(path), str(path))


def read_personal(path: Path) -> dict[str, Any]:
    """Return a personalization's ``result.json``. Raises InputError where it is damaged."""
    return _checked(_Personal, _json(path), str(path))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``. Raises InputError where there is none, or one is damaged."""
    return [_checked(_Line, record, f"{path}, round {record['round']}") for record in metrics.read(path)]


def scored(records: list[dict[str, Any]], *splits: str) -> list[dict[str, Any]]:
    """Return the records of rounds that have an accuracy on each of the splits."""
    return [r for r in records if r["round"] > 0 and all(r.get(s, {}).get("accuracy") is not None for s in splits)]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({printable(str(reason), 100)})") from None


def _checked(model: type[Model], tree: Any, where: str) -> Any:
    """Return ``tree`` as it is where it fits the model."""
    try:
        model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise InputError(f"{where}: has no {key}") from None
        found = printable(repr(first["input"]), 60)
        is_model = first["type"] == "model_type"  # pydantic's message would name the class
        allowed = "an object with keys" if is_model else first["msg"].removeprefix("Input should be ")
        raise InputError(f"{where}: {key or 'the whole'}: found {found}; allowed: {allowed}") from None
    return tree
