"""A run that is replaced by another lies aside until the new one has begun: no moment at which a crash loses both.

What lies aside says by its name what a crash has left:

- ``.replaced.part``: some of the old run's files; the others are still, or again, in their places. Put them back.
- ``.replaced``: the whole old run, and in its place a new one that has not begun. Remove that, put the old one back.
- ``.replaced.old``: what is left of the old run, and in its place a new one that has begun. Remove it.

A run has begun when its first checkpoint is saved; from then on it can be resumed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedprompt.runtime.folders.folders import CHECKPOINT, FOLDERS, own_files
from fedprompt.tracking.files import sync_folder

PART, WHOLE, OLD = ".replaced.part", ".replaced", ".replaced.old"


def lay_aside(output: Path, files: Iterable[Path]) -> None:
    """Move the files of the run in ``output`` out of the way of a new one."""
    part = output / PART
    part.mkdir()
    for path in files:
        target = part / path.relative_to(output)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    _remove_empty_folders(output)
    _rename(part, output / WHOLE)


def forget(output: Path) -> None:
    """Remove the run that lies aside: the new one has begun, or ended."""
    if (output / WHOLE).exists():
        _rename(output / WHOLE, output / OLD)
    if (output / OLD).exists():
        shutil.rmtree(output / OLD)


def put_back(output: Path) -> bool:
    """Undo what has been laid aside, instead of a new run that has not begun; returns whether there was anything."""
    if (output / WHOLE).exists():
        if (output / "config.yaml").exists():  # else the new one has written nothing
            remove_own(output)
        _rename(output / WHOLE, output / PART)
    if not (part := output / PART).exists():
        return False
    for path in [path for path in part.rglob("*") if not path.is_dir()]:
        target = output / path.relative_to(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(part)
    return True


def remove_own(output: Path) -> None:
    """Remove the files of a run that has not begun, and the folders that are empty then.

    As a new run writes config.yaml first, it goes last: where it is missing, there is nothing else.
    """
    for path in reversed(own_files(output)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _remove_empty_folders(output)


def recover(output: Path) -> list[str]:
    """Put in order what a crash in the middle of a replacement has left; returns a line that says what was done."""
    if (output / OLD).exists() or ((output / WHOLE).exists() and _has_begun(output)):
        forget(output)
        return [f"{output}: removed what was left of a run that --overwrite had replaced"]
    if put_back(output):
        return [f"{output}: --overwrite was cut off before the new run began; the run that lay there is back"]
    return []


def _has_begun(output: Path) -> bool:
    """Whether the run in ``output`` has done a round or has a checkpoint: it was cut off before it could ``forget``."""
    lines = output / "metrics.jsonl"
    rounds = lines.read_bytes().count(b"\n") if lines.exists() else 0
    return rounds > 1 or (rounds == 1 and any((output / "checkpoints").glob(CHECKPOINT)))


def _rename(path: Path, target: Path) -> None:
    path.rename(target)
    sync_folder(path.parent)


def _remove_empty_folders(output: Path) -> None:
    for name in FOLDERS:
        with suppress(OSError):  # there is none, or something of the user's in it
            (output / name).rmdir()
