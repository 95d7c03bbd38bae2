"""``metrics.jsonl``: one JSON object per line and round."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprompt.errors import InputError
from fedprompt.tracking.files import named, plain, write_atomic

Record = Mapping[str, Any]


class MetricsFile:
    """Appends records to a file; the file may be read at any time while a run goes on."""

    def __init__(self, path: Path):
        self.path = Path(path)

    @classmethod
    def resume(cls, path: Path, last_round: int) -> MetricsFile:
        """Continue ``path`` after ``last_round``: later lines and a torn last one go, a missing file is an empty one.

        Raises:
            InputError: another line is not a record.
        """
        path = Path(path)
        if path.exists():
            kept = [record for record in read(path) if record["round"] <= last_round]
            write_atomic(path, b"".join(_line(record) for record in kept))
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
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path}: not found; the folder of a run that has begun holds this file") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise InputError(
                f"{path}, line {number}: found {line[:40]!r}, allowed is one JSON object per line with a whole number "
                "'round'; repair or delete that line"
            )
    return records


def _line(record: Record) -> bytes:
    return json.dumps(plain(record), allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("round"), int) else None
