"""A command in a process of its own, and everything that it has started: to be looked at, and killed.

Nothing else is ever touched: a process counts as the command's own only where its chain of parents leads there, and it
is told from a later one with the same number by the time at which it began.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 900  # seconds that anything may take


@dataclass(frozen=True)
class Process:
    """A process; ``began`` in clock ticks since the machine started."""

    pid: int
    began: int
    title: str


class Job:
    """A running command; what it writes goes into ``log``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with open(log, "ab") as file:
            self._command = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def running(self) -> bool:
        """Whether the command has not ended."""
        return self._command.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send the command, and nobody else, a signal."""
        self._command.send_signal(number)

    def wait(self) -> int:
        """Exit code, once the command has ended; raises subprocess.TimeoutExpired."""
        return self._command.wait(PATIENCE)

    def last_line(self) -> str:
        """The last line that it wrote, without the name of our own command."""
        lines = self._log.read_text(errors="replace").splitlines() or ["(it said nothing)"]
        return lines[-1].removeprefix("fedprompt: ")

    def actors(self, name: str) -> list[Process]:
        """Processes of the Ray actors of a class, in the order in which they began."""
        return [process for process in family(self._command.pid) if process.title.startswith(f"ray::{name}")]

    def memory(self) -> int:
        """Bytes of memory that the command and all that it has started hold now; what they share counts once."""
        return sum(self.memory_by({}, "").values())

    def memory_by(self, parts: Mapping[str, str], rest: str) -> dict[str, int]:
        """The same by part: of the command, of processes whose titles begin with a key of ``parts``, of the rest."""
        held = {"command": _memory(self._command.pid)}
        for process in family(self._command.pid):
            part = next((part for start, part in parts.items() if process.title.startswith(start)), rest)
            held[part] = held.get(part, 0) + _memory(process.pid)
        return held

    def kill(self) -> None:
        """End the command and all that it has started, at once, as when a machine fails."""
        started = family(self._command.pid)
        self._command.kill()
        self._command.wait()
        while left := [process for process in started if alive(process)]:
            for process in left:  # one that starts others first tells us which
                started += [child for child in family(process.pid) if child not in started]
                kill(process)
            time.sleep(0.05)


def family(pid: int) -> list[Process]:
    """Everything that a process has started and that what it started has started, parents first."""
    children: dict[int, list[Process]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            parent, process = _look(int(folder.name))
            children.setdefault(parent, []).append(process)
    found = sorted(children.get(pid, []), key=lambda process: process.began)
    for process in found:  # grows meanwhile
        found += sorted(children.get(process.pid, []), key=lambda child: child.began)
    return found


def alive(process: Process) -> bool:
    """Whether it is still there; one that nobody has buried yet is not."""
    try:
        fields = _fields(process.pid)
    except OSError:
        return False
    return int(fields[19]) == process.began and fields[0] not in "ZX"


def kill(process: Process) -> None:
    """Kill exactly this process, if it is still there."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(process.pid)  # from here on the number cannot come to mean another one
        try:
            if alive(process):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _look(pid: int) -> tuple[int, Process]:
    """A process's parent, and itself; raises OSError where there is none."""
    fields = _fields(pid)
    title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return int(fields[1]), Process(pid, int(fields[19]), title)


def _memory(pid: int) -> int:
    with suppress(OSError):  # it has ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat behind the name: state, parent, ... and, as the 20th, when it began."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
