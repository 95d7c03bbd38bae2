"""Checkpoints: everything that a federation carries from round to round, written so that a crash loses none of it.

A store holds ``round_NNNNNN.pt``, the newest ``KEEP`` of them, and ``best.pt``, the models of the best round on
validation as of the newest checkpoint. ``earlier_NNNNNN.pt`` is what ``best.pt`` was before round N: a run that goes on
from a checkpoint before that round takes it back.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedprompt.algorithms.base import State
from fedprompt.errors import InputError
from fedprompt.runtime.checkpoints.file import Best, Checkpoint, decoded, encoded, models_of, raw
from fedprompt.tracking.files import named, sync_folder

KEEP = 2  # newest checkpoints that are kept
MOST_BYTES = 2**36  # of a file that is read
BEST = "best.pt"
_NAMES = {kind: re.compile(rf"{kind}_(\d{{6,}})\.pt") for kind in ("round", "earlier")}
_UNFINISHED = re.compile(r"(round_\d{6,}|best)\.pt\.part")


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
        """Write a checkpoint, before it the best round's models where they are new, then drop what is too old.

        Each file is written under a temporary name and then gets its own: a half-written one is never seen. On a disk
        of this machine's own it has reached the disk when this returns. After an ``OSError``, which names the file, the
        checkpoints before are still there.
        """
        if checkpoint.best is not None and checkpoint.best.state is not None:
            self._save_best(checkpoint, checkpoint.best, checkpoint.best.state)
        name = self.name(checkpoint.round)
        self._replace(name, encoded(checkpoint))
        self.damaged.pop(name, None)
        self._prune()

    def name(self, round: int) -> str:
        """The file of a round's checkpoint."""
        return f"{self._path}/round_{round:06d}.pt"

    def rounds(self) -> list[int]:
        """Rounds of which there is a checkpoint, ascending."""
        return list(self._numbered("round"))

    def of(self, round: int) -> Checkpoint:
        """Read the checkpoint of a round that is there. Raises InputError where it is damaged."""
        return self._whole(self.name(round), round)

    def is_empty(self) -> bool:
        """Whether there is no checkpoint."""
        return not self._numbered("round")

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is not damaged, executing nothing in it; None where there is none at all.

        Raises InputError where all of them are damaged, or one is whole and not what a run writes.
        """
        self.damaged = {}
        numbered = self._numbered("round")
        for round, name in reversed(numbered.items()):
            data = self._read(name)
            try:
                content = raw(data)
            except InputError:
                raise
            except Exception as error:  # torch, its unpickler and zipfile raise many types
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.damaged[name] = f"not a readable checkpoint ({reason})"
            else:
                return decoded(content, name, round)
        if numbered:
            name = self.name(max(numbered))
            raise InputError(f"{name}: {self.damaged[name]}, nor is any other there; allowed: --overwrite")
        return None

    def best(self) -> Checkpoint | None:
        """Read the models of the best round; None where they were not kept. Raises InputError where damaged."""
        name = f"{self._path}/{BEST}"
        if not self._fs.exists(name):
            return None
        return self._whole(name, None)

    def take_back_best(self, checkpoint: Checkpoint) -> str | None:
        """Make ``best.pt`` what it was when ``checkpoint`` was written; a line where that cannot be.

        Without one at that time there is none afterwards.
        """
        name, earlier = f"{self._path}/{BEST}", self._numbered("earlier")
        later = [file for round, file in earlier.items() if round > checkpoint.round]
        if later:
            self._fs.mv(later[0], name)
        for file in later[1:]:
            self._fs.rm_file(file)
        best = checkpoint.best
        try:
            found = self.best()
        except InputError as error:
            return None if best is None or best.state is not None else f"{error}; the best model so far is lost"
        if found is not None and (best is None or found.round != best.round):
            self._fs.rm_file(name)
            found = None
        if best is None or best.state is not None or found is not None:
            return None
        return f"{name}: missing; the model of round {best.round}, the best so far, is lost"

    def tidy(self) -> None:
        """Drop what only an interrupted run would need, once all rounds are done."""
        for name in self._numbered("earlier").values():
            self._fs.rm_file(name)

    def _whole(self, name: str, round: int | None) -> Checkpoint:
        data = self._read(name)
        try:
            content = raw(data)
        except InputError:
            raise
        except Exception as error:  # as in `latest`
            raise InputError(f"{name}: not readable ({' '.join(str(error).split())})") from None
        return decoded(content, name, round)

    def _save_best(self, checkpoint: Checkpoint, best: Best, state: State) -> None:
        name = f"{self._path}/{BEST}"
        models = replace(checkpoint, round=best.round, state=models_of(state), totals={}, best=Best(best.numbers))
        self._replace(name, encoded(models), f"{self._path}/earlier_{checkpoint.round:06d}.pt")

    def _prune(self) -> None:
        whole = {round: name for round, name in self._numbered("round").items() if name not in self.damaged}
        oldest = min(list(whole)[-KEEP:])
        earlier = [name for round, name in self._numbered("earlier").items() if round <= oldest]
        unfinished = [name for name in self._files() if _UNFINISHED.fullmatch(Path(name).name)]
        for name in [*self.damaged, *list(whole.values())[:-KEEP], *earlier, *unfinished]:
            with suppress(FileNotFoundError):
                self._fs.rm_file(name)
        self.damaged.clear()

    def _replace(self, name: str, data: bytes, aside: str | None = None) -> None:
        """Write a file whole; what had its name before is kept as ``aside``, where one is given and not there yet.

        It is there where the same save was tried before and failed later on.
        """
        try:
            with named(name):
                self._write(f"{name}.part", data)
                if aside is not None and self._fs.exists(name) and not self._fs.exists(aside):
                    self._fs.mv(name, aside)
                self._fs.mv(f"{name}.part", name)
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{name}.part")
            raise
        if self._is_local():
            sync_folder(Path(self._path))

    def _read(self, name: str) -> bytes:
        if (size := self._fs.size(name)) > MOST_BYTES:
            raise InputError(f"{name}: has {size:,} bytes; allowed: a checkpoint of at most {MOST_BYTES:,}")
        with self._fs.open(name, "rb") as file:
            return file.read()

    def _write(self, name: str, data: bytes) -> None:
        with self._fs.open(name, "wb") as file:
            file.write(data)
            if self._is_local():
                file.flush()
                os.fsync(file.fileno())

    def _is_local(self) -> bool:
        return isinstance(self._fs, LocalFileSystem)

    def _files(self) -> list[str]:
        return [str(name) for name in self._fs.ls(self._path, detail=False)]

    def _numbered(self, kind: str) -> dict[int, str]:
        """Files of a kind by their round, ascending."""
        found = [(match, name) for name in self._files() if (match := _NAMES[kind].fullmatch(Path(name).name))]
        return dict(sorted((int(match[1]), name) for match, name in found))


def store_of(storage: str | None, output: Path) -> CheckpointStore:
    """Where a run's checkpoints are: ``runtime.storage``, else a folder in its output."""
    return CheckpointStore(storage or str(output / "checkpoints"))
