"""Processes of a cluster of this machine's own, when the command that started it is gone: a watchdog ends them.

Ray's own agents outlive a killed command for a minute. Every process of a command's cluster has the command's mark in
its environment, and only processes with the mark of a dead command are ever touched. Without /proc nothing is done.
Run as a program, this file is the watchdog: it waits for the end of its standard input, which the command holds open.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "FEDPROMPT_COMMAND"
PATIENCE = 10.0  # seconds for processes that were ended by the command itself


@contextmanager
def marked() -> Iterator[None]:
    """Give processes that are started inside this command's mark."""
    os.environ[MARK] = _mark(os.getpid())
    try:
        yield
    finally:
        del os.environ[MARK]


@contextmanager
def watched() -> Iterator[None]:
    """Have a watchdog end everything that bears this command's mark when the body, or the command, has ended."""
    if not Path("/proc/self/environ").exists():
        yield
        return
    command = [sys.executable, "-I", "-S", __file__, _mark(os.getpid())]  # nothing but the standard library
    nowhere = subprocess.DEVNULL
    watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        yield
    finally:
        watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            watchdog.wait(2 * PATIENCE)


def watch(mark: str) -> None:
    """End what dead commands have left, then wait, and end what the command of ``mark`` has left."""
    _end(lambda found: not _alive(found))
    sys.stdin.buffer.read()
    if _alive(mark):  # it has ended its cluster itself, which may take a moment
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(found == mark for _, found in _bearers()):
            time.sleep(0.1)
    _end(lambda found: found == mark)


def _end(is_meant: Callable[[str], bool]) -> None:
    """Kill processes by their marks until there are none; those that start others meanwhile are caught, too."""
    for _ in range(50):
        found = [pid for pid, mark in _bearers() if is_meant(mark)]
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _bearers() -> Iterator[tuple[int, str]]:
    """All of this user's processes that bear a mark, and their marks; those that nobody has buried yet do not count."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid() or int(folder.name) == os.getpid():
                continue
            for entry in (folder / "environ").read_bytes().split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name == MARK.encode():
                    yield int(folder.name), value.decode(errors="replace")


def _mark(pid: int) -> str:
    """Names a process for good: its namespace, its number, and its start in ticks of the machine's clock."""
    began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.readlink(f'/proc/{pid}/ns/pid')} {pid} {began}"


def _alive(mark: str) -> bool:
    """Whether the command of a mark runs; of one whose number means nothing here that is taken for granted."""
    space, _, rest = mark.partition(" ")
    if space != os.readlink("/proc/self/ns/pid"):
        return True
    try:
        pid = int(rest.split()[0])
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return _mark(pid) == mark and state not in "ZX"
    except (OSError, ValueError, IndexError):
        return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(sys.argv[1])
