"""A lease on storage that has no locks: a small file, renewed while its holder lives, that expires otherwise.

All times are modification times as the storage reports them: no host's own clock counts. Storage that knows no other
way than to overwrite a file cannot decide a race by itself, so who takes a lease looks again after a while whether it
is still theirs; and who holds one looks before every write.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import fsspec

from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.folders.holders import LOCK, Holder, InUse

RENEWED, EXPIRES = 30.0, 300.0  # seconds
SETTLES = 3.0  # seconds in which a write that began earlier has arrived


class Lease:
    """The lease of ``holder`` on the folder at ``uri``. ``key``: the setting that named it, for messages."""

    def __init__(self, uri: str, key: str, holder: Holder) -> None:
        self.place, self._key, self.holder = uri, key, holder
        self._fs, folder = fsspec.core.url_to_fs(uri)
        self._name = f"{folder}/{LOCK}"
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()

    def acquire(self) -> Lease:
        """Take the lease and renew it from now on. Raises InUse where another one's has not expired."""
        self._fs.makedirs(self._name.rpartition("/")[0], exist_ok=True)
        self.look()
        self._write()
        time.sleep(SETTLES)
        if (now := self._read()) is None or now.token != self.holder.token:
            raise self._in_use(now)
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return self

    def look(self) -> None:
        """Raise InUse where another one's lease has not expired."""
        found = self._read()
        if found is not None and not self._may_take_from(found):
            raise self._in_use(found)

    def check(self) -> None:
        """Renew the lease; raises RunFailed where another one has it, or its holder has ended."""
        if self.holder.has_ended():
            raise RunFailed(f"{self.place}: {self.holder}, for which this was at work, has ended; stopped")
        with self._one_at_a_time:
            self._renew()

    def release(self) -> None:
        """Let others in."""
        self._over.set()
        with self._one_at_a_time, suppress(FileNotFoundError):
            found = self._read()
            if found is not None and found.token == self.holder.token:
                self._fs.rm_file(self._name)

    def _keep(self) -> None:
        """Renew the lease until it is given back; what goes wrong here is told by the next check."""
        while not self._over.wait(RENEWED):
            with self._one_at_a_time, suppress(OSError):
                if self._over.is_set():
                    return
                try:
                    self._renew()
                except RunFailed:
                    return

    def _renew(self) -> None:
        found = self._read()
        if found is not None and found.token != self.holder.token:
            raise self._taken(found)
        before = None if found is None else self._modified(self._name)
        self._write()
        # Deleted by somebody, or expired, as where this process was put to sleep: another one may be taking it, too.
        if before is None or self._modified(self._name) - before > timedelta(seconds=EXPIRES):
            time.sleep(SETTLES)
            if (now := self._read()) is None or now.token != self.holder.token:
                raise self._taken(now)

    def _may_take_from(self, other: Holder) -> bool:
        """Whether another one's lease has ended: its process has, or it works for our command, or it has expired."""
        if other.has_ended() or other.session == self.holder.session:
            return True
        probe = f"{self._name}-{self.holder.token}"
        self._fs.pipe_file(probe, b"")
        try:
            return self._modified(probe) - self._modified(self._name) > timedelta(seconds=EXPIRES)
        except FileNotFoundError:  # given back this moment
            return True
        finally:
            self._fs.rm_file(probe)

    def _modified(self, name: str) -> Any:
        self._fs.invalidate_cache()
        try:
            return self._fs.modified(name)
        except NotImplementedError:
            raise InputError(
                f"{self._key}: {self.place} tells no times of modification, by which a run that died is told from one "
                "that lives; allowed: a folder, or storage that does"
            ) from None

    def _read(self) -> Holder | None:
        self._fs.invalidate_cache()
        try:
            return Holder.parse(self._fs.cat_file(self._name))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._fs.pipe_file(self._name, self.holder.content())

    def _in_use(self, other: Holder | None) -> InUse:
        wait = f"once that has ended, or {EXPIRES / 60:.0f} minutes after it died"
        return InUse(self._key, self.place, other, wait, leased=True)

    def _taken(self, other: Holder | None) -> RunFailed:
        return RunFailed(f"{self.place}: {other or 'somebody'} has taken it over; stopped")
