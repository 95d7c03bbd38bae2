"""The system's lock on a folder of this machine's own disk: it ends with the process, however that ends.

The lock is on the folder itself, so that no file that a user deletes undoes it; ``.fedprompt-lock`` in the folder only
says who holds it. A process that writes for the holder, such as the driver actor of a run on Ray, locks that file in
addition: where a command was killed, the next one waits until the killed one's driver has ended.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.folders.holders import LOCK, Holder, InUse, is_unused

ORPHANS_END = 60.0  # seconds that a process which writes for a killed command gets to end
GLANCES = 0.2  # seconds that a reader's look at the lock may take
NOTE_COMES = 1.0  # seconds until who has just locked a folder has said so
PAUSE = 0.05


class FolderLock:
    """Hold ``folder``, which is made if needed.

    Raises InUse where another process holds it, InputError where it is a file, and OSError with ENOLCK or the like on a
    file system without locks.
    """

    def __init__(self, folder: Path, key: str, holder: Holder) -> None:
        self._folder, self._key, self.holder = folder, key, holder
        self._number, self._made = self._locked()
        self.place = str(folder.resolve())
        try:
            self._note = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                before = _read(self._note)
                _write(self._note, holder)  # first, so that a driver which has yet to begin for ``before`` sees it
                if not waited(lambda: _flock(self._note), ORPHANS_END):
                    raise InUse(key, str(folder), before, "once that has ended; it writes on although its command died")
                _flock(self._note, fcntl.LOCK_UN)
            except BaseException:
                os.close(self._note)
                raise
        except BaseException:
            os.close(self._number)
            raise

    def check(self) -> None:
        """Raise RunFailed where the folder was deleted or replaced meanwhile."""
        if not _is(self._folder, self._number):
            raise RunFailed(f"{self._folder}: the folder was removed or replaced while it was written to; stopped")

    def release(self) -> None:
        """Let others in; a folder that was made for this and is still empty goes."""
        # a driver that was told to end may still be about to: then its lock file stays, for the next one to wait for it
        over = waited(lambda: _flock(self._note), 1.0)
        if _is(self._folder, self._number):
            if over and _is(self._folder / LOCK, self._note):
                (self._folder / LOCK).unlink()
            if self._made and is_unused(self._folder) and over:
                with suppress(OSError):  # somebody has put something there this moment
                    self._folder.rmdir()
        os.close(self._note)
        os.close(self._number)

    def _locked(self) -> tuple[int, bool]:
        """The folder, opened and locked, and whether it was made here."""
        while True:
            made = _make(self._folder, self._key)
            number = os.open(self._folder, os.O_RDONLY)
            try:
                if not waited(lambda: _flock(number), GLANCES):  # noqa: B023
                    raise InUse(self._key, str(self._folder), _who(self._folder))
                if _is(self._folder, number):  # not so where its last holder has just removed it
                    return number, made
            except BaseException:
                os.close(number)
                raise
            os.close(number)


class Joined:
    """Write to a folder for its ``holder``, which is another process. Raises RunFailed where its hold has ended."""

    def __init__(self, folder: Path, holder: Holder) -> None:
        self._folder, self.place, self.holder = folder, str(folder), holder
        self._note = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not waited(lambda: _flock(self._note), ORPHANS_END):
                raise RunFailed(f"{folder}: the driver before this one has not ended; stopped")
            self.check()
        except BaseException:
            os.close(self._note)
            raise

    def check(self) -> None:
        """Raise RunFailed where the holder has ended, or another command has the folder."""
        still_held(self._folder, self.holder)

    def release(self) -> None:
        """Be done with writing."""
        os.close(self._note)


def look(folder: Path, key: str) -> None:
    """Raise InUse where another process holds a folder, of which nothing is to be written now."""
    number = os.open(folder, os.O_RDONLY)
    try:
        if not _flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB):
            raise InUse(key, str(folder), _who(folder))
    finally:
        os.close(number)


def still_held(folder: Path, holder: Holder) -> None:
    """Raise RunFailed where ``holder`` has ended, or the folder's lock file names another one.

    A lock file that somebody has deleted says nothing: the holder's own lock is on the folder.
    """
    if holder.has_ended():
        raise RunFailed(f"{folder}: {holder}, for which this was at work, has ended; stopped")
    now = _named(folder)
    if now is not None and now.session != holder.session:
        raise RunFailed(f"{folder}: {now} has taken it over; stopped")


def waited(free: Callable[[], bool], seconds: float) -> bool:
    """Ask again and again until it is so, for some seconds at most; returns whether it is."""
    end = time.monotonic() + seconds
    while not free():
        if time.monotonic() >= end:
            return False
        time.sleep(PAUSE)
    return True


def _make(folder: Path, key: str) -> bool:
    """Make a folder; returns whether it was not there."""
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        if not folder.is_dir():
            raise InputError(f"{key}: {folder} is a file; allowed: a folder") from None
        return False


def _who(folder: Path) -> Holder | None:
    """Who has just been found to hold a folder: who holds it may have yet to say so."""
    found: list[Holder | None] = [None]

    def said() -> bool:
        found[0] = _named(folder)
        return found[0] is not None and not found[0].has_ended()

    waited(said, NOTE_COMES)
    return found[0]


def _named(folder: Path) -> Holder | None:
    """Who the lock file names; None where there is none."""
    found: list[bytes] = [b""]

    def whole() -> bool:
        found[0] = (folder / LOCK).read_bytes()
        return Holder.parse(found[0]) is not None

    try:
        waited(whole, 3 * PAUSE)  # it may be half written this moment
    except FileNotFoundError:
        return None
    return Holder.parse(found[0])


def _read(note: int) -> Holder | None:
    return Holder.parse(os.pread(note, 1 << 16, 0))


def _write(note: int, holder: Holder) -> None:
    content = holder.content()
    os.pwrite(note, content, 0)
    os.ftruncate(note, len(content))


def _flock(number: int, how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Lock an open file or folder; returns whether no other process has."""
    try:
        fcntl.flock(number, how)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, number: int) -> bool:
    """Whether ``path`` still is the opened file or folder."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except FileNotFoundError:
        return False
