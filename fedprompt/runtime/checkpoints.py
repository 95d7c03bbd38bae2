"""Checkpoints: everything that a federation carries from round to round, written so that a crash loses none of it."""

from __future__ import annotations

import io
import os
import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem

from fedprompt.algorithms.base import State
from fedprompt.errors import InputError
from fedprompt.tracking.files import named, sync_folder

KEEP = 2  # newest checkpoints that are kept
_NAME = re.compile(r"round_(\d{6})\.pt$")


@dataclass(frozen=True)
class Checkpoint:
    """A federation after ``round`` rounds. ``totals`` are sums over the rounds so far (bytes, seconds)."""

    round: int
    state: State
    totals: dict[str, float] = field(default_factory=dict)


class CheckpointStore:
    """A folder of checkpoints, on a disk or behind any URI that fsspec knows (``s3://…``, ``gs://…``).

    ``damaged``: what ``latest`` passed over, as {file: what is wrong with it}; these files go with the next save.
    """

    def __init__(self, uri: str) -> None:
        try:
            self._fs, self._path = fsspec.core.url_to_fs(uri)
            self._fs.makedirs(self._path, exist_ok=True)
        except Exception as error:  # whatever the package behind a URI and its network may raise
            if "://" not in uri:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"runtime.storage: cannot use '{uri}' ({reason}); allowed: a folder, or an fsspec URI to write to"
            ) from None
        self.damaged: dict[str, str] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint under a temporary name, then give it its own: a half-written one is never seen.

        On a disk of this machine's own it has reached the disk when this returns. After an ``OSError``, which names the
        file, the checkpoints before are still there.
        """
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
            with named(name):
                self._write(f"{name}.part", buffer.getvalue())
                self._fs.mv(f"{name}.part", name)
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{name}.part")
            raise
        if self._is_local():
            sync_folder(Path(self._path))
        self.damaged.pop(name, None)
        whole = [name for name in self._names() if name not in self.damaged]
        for old in [*self.damaged, *whole[:-KEEP]]:
            with suppress(FileNotFoundError):
                self._fs.rm_file(old)
        self.damaged.clear()

    def is_empty(self) -> bool:
        """Whether there is no checkpoint."""
        return not self._names()

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is not damaged, executing nothing in it; None where there is none at all.

        Raises InputError where all of them are damaged.
        """
        self.damaged = {}
        names = self._names()
        for name in reversed(names):
            with self._fs.open(name, "rb") as file:
                data = file.read()
            try:
                return _parsed(data)
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.damaged[name] = f"not a readable checkpoint ({reason})"
        if names:
            raise InputError(f"{names[-1]}: {self.damaged[names[-1]]}, nor is any other there; allowed: --overwrite")
        return None

    def _write(self, name: str, data: bytes) -> None:
        with self._fs.open(name, "wb") as file:
            file.write(data)
            if self._is_local():
                file.flush()
                os.fsync(file.fileno())

    def _is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def _names(self) -> list[str]:
        found = [str(name) for name in self._fs.ls(self._path, detail=False)]
        return sorted(name for name in found if _NAME.search(name))


def _parsed(data: bytes) -> Checkpoint:
    """Read a file's content; raises something where it is not what was written."""
    if broken := zipfile.ZipFile(io.BytesIO(data)).testzip():  # torch itself compares no checksums
        raise ValueError(f"wrong checksum of {broken}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged files, in many lines
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return Checkpoint(content["round"], State(**content["state"]), content["totals"])


def store_of(storage: str | None, output: Path) -> CheckpointStore:
    """Where a run's checkpoints are: ``runtime.storage``, else a folder in its output."""
    return CheckpointStore(storage or str(output / "checkpoints"))
