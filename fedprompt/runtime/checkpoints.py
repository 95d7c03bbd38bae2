"""Checkpoints: everything that a federation carries from round to round, written so that a crash loses none of it."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch

from fedprompt.algorithms.base import State
from fedprompt.errors import InputError

KEEP = 2  # newest checkpoints that are kept
_NAME = re.compile(r"round_(\d{6})\.pt$")


@dataclass(frozen=True)
class Checkpoint:
    """A federation after ``round`` rounds. ``totals`` are sums over the rounds so far (bytes, seconds)."""

    round: int
    state: State
    totals: dict[str, float] = field(default_factory=dict)


class CheckpointStore:
    """A folder of checkpoints, on a disk or behind any URI that fsspec knows (``s3://…``, ``gs://…``)."""

    def __init__(self, uri: str) -> None:
        try:
            self._fs, self._path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise InputError(
                f"runtime.storage: cannot use '{uri}' ({error}); allowed: a folder or an fsspec URI"
            ) from None
        self._fs.makedirs(self._path, exist_ok=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under a temporary name, then give it its own: a half-written one is never seen."""
        state = checkpoint.state
        content: dict[str, Any] = {
            "round": checkpoint.round,
            "state": {"params": state.params, "clients": state.clients, "memory": state.memory},
            "totals": checkpoint.totals,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        name = f"{self._path}/round_{checkpoint.round:06d}.pt"
        try:
            with self._fs.open(f"{name}.part", "wb") as file:
                file.write(buffer.getvalue())
            self._fs.mv(f"{name}.part", name)
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{name}.part")
            raise
        for old in self._names()[:-KEEP]:
            self._fs.rm_file(old)

    def is_empty(self) -> bool:
        """Whether there is no checkpoint."""
        return not self._names()

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint, executing nothing in it; None where there is none.

        Raises InputError where the file is damaged.
        """
        names = self._names()
        if not names:
            return None
        with self._fs.open(names[-1], "rb") as file:
            data = file.read()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about damaged files, in many lines
                content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return Checkpoint(content["round"], State(**content["state"]), content["totals"])
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{names[-1]}: not a readable checkpoint ({reason}); delete it to resume from the one before"
            ) from None

    def _names(self) -> list[str]:
        found = [str(name) for name in self._fs.ls(self._path, detail=False)]
        return sorted(name for name in found if _NAME.search(name))


def store_of(storage: str | None, output: Path) -> CheckpointStore:
    """Where a run's checkpoints are: ``runtime.storage``, else a folder in its output."""
    return CheckpointStore(storage or str(output / "checkpoints"))
