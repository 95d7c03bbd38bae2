"""One command at a time writes to a folder; a second one is refused in one line that says who is there.

On a disk of this machine's own the system's lock decides (``folder_lock.py``), on storage that several hosts share, and
behind URIs, a lease does (``leases.py``). Whoever writes calls ``Held.check`` before: a run that has lost its folder
stops.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fedprompt.runtime.folders.folder_lock import ORPHANS_END, PAUSE, FolderLock, Joined, look, still_held
from fedprompt.runtime.folders.holders import Holder, InUse
from fedprompt.runtime.folders.leases import EXPIRES, RENEWED, Lease

SHARED = ("nfs", "cifs", "smb", "fuse.", "lustre", "gpfs", "beegfs", "ceph", "9p", "afs", "ocfs", "gfs", "virtiofs")
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # what a file system without them says


class Lock(Protocol):
    """A hold of ``holder`` on a folder or URI, ``place``."""

    place: str
    holder: Holder

    def check(self) -> None:
        """Raise RunFailed where the folder is not ours any more."""

    def release(self) -> None:
        """Let others in."""


@dataclass(frozen=True)
class Ticket:
    """A folder that ``holder`` holds, told to another process that works for it."""

    place: str
    holder: Holder
    leased: bool

    def join(self) -> Lock:
        """Write to the folder, too. Raises RunFailed where the hold has ended."""
        if not self.leased:
            return Joined(Path(self.place), self.holder)
        lease = Lease(self.place, "", self.holder)
        lease.check()
        return lease

    def check(self) -> None:
        """Raise RunFailed where the hold has ended; many processes may ask."""
        if self.leased:
            Lease(self.place, "", self.holder).check()
        else:
            still_held(Path(self.place), self.holder)


class Held:
    """The folders that a process writes to; none of them where nobody asked for a lock.

    A ticket among them is what its command holds: this process checks that, and lets go of nothing in the end.
    """

    def __init__(self, *locks: Lock | Ticket) -> None:
        self._locks = locks

    def check(self) -> None:
        """Raise RunFailed, with one line, where one of the folders is not ours any more."""
        for lock in self._locks:
            lock.check()

    def passed_on(self) -> PassedOn:
        """What another process needs to write for this one."""
        return PassedOn(tuple(Ticket(lock.place, lock.holder, isinstance(lock, Lease)) for lock in self._locks))

    @contextmanager
    def joined(self) -> Iterator[Held]:
        """Nothing is left to do in the process that holds the folders."""
        yield self


NOBODY = Held()


@dataclass(frozen=True)
class PassedOn:
    """Folders that a command holds, told to another process that works for it; none by default."""

    tickets: tuple[Ticket, ...] = ()

    @property
    def session(self) -> str | None:
        """The command's."""
        return self.tickets[0].holder.session if self.tickets else None

    @contextmanager
    def joined(self) -> Iterator[Held]:
        """Write to the folders beside the command, alone. Raises RunFailed where it has ended or lost one of them."""
        with ExitStack() as stack:
            locks = []
            for ticket in self.tickets:
                locks.append(ticket.join())
                stack.callback(locks[-1].release)
            yield Held(*locks)


@contextmanager
def entered(
    place: Path | str, key: str, command: str, *, session: str | None = None, patient: bool = False
) -> Iterator[Lock]:
    """Hold a folder (made if needed; removed in the end where it is still empty), or the storage behind a URI.

    Args:
        place: the folder or URI.
        key: the option or setting that named it, for messages.
        command: what is said of us to those that are refused.
        session: that of the command which this process works for; left out, this process is the command.
        patient: wait for as long as it may take a killed command's processes to end.

    Raises:
        InUse: another command holds it.
        InputError: it is a file.
    """
    holder = Holder.here(command, session)
    lock = _taken(lambda: _enter(place, key, holder), patient)
    try:
        yield lock
    finally:
        lock.release()


def _enter(place: Path | str, key: str, holder: Holder) -> Lock:
    fs, path = fsspec.core.url_to_fs(str(place))
    if not isinstance(fs, LocalFileSystem):
        return Lease(str(place), key, holder).acquire()
    folder = place if isinstance(place, Path) else Path(path)
    if not is_shared(folder):
        try:
            return FolderLock(folder, key, holder)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    return Lease(str(folder), key, holder).acquire()


def _taken(enter: Callable[[], Lock], patient: bool) -> Lock:
    """Enter a folder; where patience is asked for, try again until its last holder must have ended."""
    began = time.monotonic()
    while True:
        try:
            return enter()
        except InUse as refused:
            patience = (EXPIRES + RENEWED if refused.leased else ORPHANS_END) if patient else 0.0
            if time.monotonic() - began >= patience:
                raise
        time.sleep(PAUSE)


def refuse_if_used(folder: Path, key: str) -> None:
    """Raise InUse where a command is writing to a folder, of which nothing is to be written now."""
    if is_shared(folder):
        Lease(str(folder), key, Holder.here("")).look()
    else:
        look(folder, key)


def is_shared(folder: Path) -> bool:
    """Whether other hosts may write to a folder's file system, so that this host's locks say nothing."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return False
    found = ("/", "")
    for line in mounts.read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")
        if folder.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind.split()[0])
    return found[1].startswith(SHARED)
