"""Who holds a folder: a command of some process on some host, as it stands in the folder's lock file."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from fedprompt.errors import InputError

LOCK = ".fedprompt-lock"


@dataclass(frozen=True)
class Holder:
    """One hold on one folder.

    ``session`` is shared by all processes that work for one command. ``machine`` names the boot and the process
    namespace in which ``process`` and its start time ``started`` mean something; both are empty where that is unknown.
    """

    command: str
    process: int
    host: str
    since: str
    session: str
    token: str
    machine: str
    started: str

    @classmethod
    def here(cls, command: str, session: str | None = None) -> Holder:
        """Return a new hold of this process."""
        return cls(
            command=command,
            process=os.getpid(),
            host=socket.gethostname(),
            since=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
            session=session or uuid4().hex,
            token=uuid4().hex,
            machine=_machine(),
            started=_started(os.getpid()),
        )

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """Read a lock file; None where it is empty, half written or no lock file of ours."""
        try:
            found = json.loads(content)
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (ValueError, TypeError, KeyError):
            return None

    def content(self) -> bytes:
        """The lock file's text."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def has_ended(self) -> bool:
        """Whether the process is known to have ended; False for one of another machine, of which nothing is known."""
        return bool(self.machine) and self.machine == _machine() and self.started != _started(self.process)

    def __str__(self) -> str:
        return f"'{self.command}' (process {self.process} on {self.host}, since {self.since})"


class InUse(InputError):
    """A folder that another command is writing to: one line that says which.

    ``place``: the folder. ``wait``: when it may be free again. ``leased``: whether it is held by a lease, which may
    outlive its holder.
    """

    def __init__(
        self, key: str, place: str, holder: Holder | None, wait: str = "once that has ended", leased: bool = False
    ) -> None:
        self.place, self.leased = place, leased
        who = str(holder) if holder else "another process"
        super().__init__(f"{key}: {place} is in use by {who}; allowed: another folder, or this one {wait}")


def is_unused(folder: Path) -> bool:
    """Whether a folder is missing or empty; the lock file of a command that was killed does not count."""
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def _machine() -> str:
    """This boot and process namespace, in which process ids are unique; empty where the system does not tell."""
    if sys.platform != "linux":
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> str:
    """When a process began, in the kernel's ticks since the boot; empty where there is none."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]  # a zombie writes nothing any more
