"""``metrics.jsonl``: one JSON object per line and round."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedprompt.errors import InputError
from fedprompt.texts import printable
from fedprompt.tracking.files import named, plain, write_atomic

Record = Mapping[str, Any]
RESTORE = "allowed: a line for every round up to the checkpoint's; restore the file, or give --overwrite"
ALWAYS = ("cohort", "train", "aggregate", "communication", "seconds")  # parts of every line but that of round 0

Number = float | int | None  # what is not finite is written as null
Count = Annotated[int, Field(ge=0)]
MOST_DIGITS = 300  # of a whole number: a float can hold it


class _Strict(BaseModel):
    """A part of a line: what is known has its type, anything else may be there besides."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Scores(_Strict):
    accuracy: Number = None
    balanced_accuracy: Number = None
    macro_f1: Number = None
    loss: Number = None
    per_class: list[Number] = []


class _Numbered(_Strict):
    round: Count


class _Line(_Numbered):
    cohort: list[Count] = []
    dropped: list[Count] = []
    late: list[Count] = []
    left_out: list[Count] = []
    out_of_budget: list[Count] = []
    communication: dict[str, Number] = {}
    queries: dict[str, Count] = {}
    train: dict[str, Number] = {}
    aggregate: dict[str, Number] = {}
    seconds: dict[str, Number] = {}
    validation: _Scores | None = None
    test: _Scores | None = None
    clients: dict[str, Number | list[Number]] = {}
    warnings: list[str] = []


class MetricsFile:
    """Appends records to a file; the file may be read at any time while a run goes on."""

    def __init__(self, path: Path):
        self.path = Path(path)

    @classmethod
    def resume(cls, path: Path, last_round: int) -> MetricsFile:
        """Continue ``path`` after ``last_round``: later lines, repeated ones and a torn last one go.

        A missing file is an empty one.

        Raises:
            InputError: another line is not a record.
        """
        path = Path(path)
        if path.exists():
            write_atomic(path, b"".join(line + b"\n" for line, _ in _kept(path, last_round)))
        return cls(path)

    def append(self, record: Record) -> None:
        """Write one line, onto the disk: a later checkpoint counts on it. NaN and infinities become null.

        After an ``OSError`` the file may end in half a line, which ``read`` leaves out and ``resume`` takes away.
        """
        line = _line(record)
        with named(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file in their order, without a last line that was cut off while being written.

    Raises:
        InputError: the file is not there, or a line before the last one is not a record.
    """
    return [record for _, record in _lines(Path(path))]


def rounds_so_far(path: Path, last_round: int) -> list[dict[str, Any]]:
    """Return the records up to ``last_round``, one per round in their order; none where the file is missing or empty.

    A line that is there twice, word for word, counts once.

    Raises:
        InputError: a line is not a record, or a round between the first and ``last_round`` is missing or told twice.
    """
    path = Path(path)
    records = [record for _, record in _kept(path, last_round)] if path.exists() else []
    for at, record in enumerate(records):
        if record["round"] != records[0]["round"] + at:
            raise InputError(f"{path}: round {record['round']} follows on {records[at - 1]['round']}; {RESTORE}")
        if record["round"] > 0 and (lacking := [part for part in ALWAYS if part not in record]):
            raise InputError(f"{path}: the line of round {record['round']} has no '{lacking[0]}'; {RESTORE}")
    if records and records[-1]["round"] != last_round:
        raise InputError(
            f"{path}: ends with round {records[-1]['round']}, the checkpoint is at {last_round}; {RESTORE}"
        )
    return records


def _kept(path: Path, last_round: int) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines up to a round, without such as repeat the one before word for word."""
    lines = [(line, record) for line, record in _lines(path) if record["round"] <= last_round]
    return [now for at, now in enumerate(lines) if not at or now[0] != lines[at - 1][0]]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines as they stand in a file, and the records that they are; InputError as in ``read``."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; the folder of a run that has begun holds this file") from None
    found = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            _check(record, path)
            found.append((line, record))
        elif number < len(lines):
            raise InputError(
                f"{path}, line {number}: found {line[:40]!r}, allowed is one JSON object per line with a whole number "
                "'round'; repair or delete that line"
            )
    return found


def _line(record: Record) -> bytes:
    return json.dumps(plain(record), allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None where it is torn, or none of a round."""
    try:
        record = json.loads(line, parse_constant=_refuse, parse_int=_whole)
        _Numbered.model_validate(record)
    except (ValueError, RecursionError):
        return None
    return record


def _check(record: dict[str, Any], path: Path) -> None:
    """Raise InputError that names the first key whose value is nothing that a run writes there."""
    try:
        _Line.model_validate(record)
    except ValidationError as error:
        first, keys = error.errors()[0], []
        value: Any = record
        for part in first["loc"]:  # beyond the value stand the types that it could have had
            inside = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
            if not inside:
                break
            keys.append(str(part))
            value = value[part]
        found, allowed = printable(repr(value), 60), first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"{path}, round {record['round']}: {'.'.join(keys)}: found {found}; allowed: {allowed}"
        ) from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits is none of a run's")
    return int(digits)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")
