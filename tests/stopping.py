"""Runs stopped at random moments, by signals as users and schedulers send them: what must hold of every one of them.

``python tests/stopping.py [--ray] [--fresh] [MOMENTS]`` tries each pattern of signals at so many moments (20), and
prints what does not hold; tests/test_stopping.py has a few fixed moments.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tiny import TINY

from benchmarks.processes import alive, family
from fedprompt.__main__ import main

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
PATTERNS = {"INT": (INT,), "INT+INT": (INT, INT), "TERM": (TERM,), "TERM+TERM": (TERM, TERM), "HUP": (HUP,)}
PATTERNS |= {"INT+TERM+HUP": (INT, TERM, HUP), "KILL": (KILL,)}
SETTINGS = [*TINY, "algorithm.name=fedavg", "data.limit=120", "partition.min_size=1", "federation.rounds=6"]
LAST = re.compile(r"fedprompt: (stopped; continue with: fedprompt \S.*|interrupted)")


class Forked:
    """fedprompt in a fork of this process, which has imported everything, so that a run takes a second."""

    def __init__(self, arguments: Sequence[object], out: IO, errors: IO) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become([str(argument) for argument in arguments], out, errors)

    def send_signal(self, number: int) -> None:
        """As subprocess.Popen."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float = 0) -> int:
        """As subprocess.Popen, but it waits for ever."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @staticmethod
    def _become(arguments: list[str], out: IO, errors: IO) -> None:
        try:
            os.dup2(out.fileno(), 1), os.dup2(errors.fileno(), 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
            sys.argv = ["fedprompt", *arguments]
            for number in (INT, TERM, HUP):
                signal.signal(number, signal.default_int_handler if number == INT else signal.SIG_DFL)
            main()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)


def fresh(arguments: Sequence[object], out: IO, errors: IO) -> subprocess.Popen:
    """fedprompt in a process of its own, with its start."""
    command = [sys.executable, "-m", "fedprompt", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    errors: str
    left: list[str] = field(default_factory=list)  # processes that outlive it

    def faults(self, signals: Sequence[signal.Signals]) -> list[str]:
        """What is not as it must be after these signals."""
        lines = self.errors.splitlines()
        found = [f"left behind: {title}" for title in self.left]
        if signals[-1] == KILL:
            return found
        if self.code == 0:  # it was faster
            return found + ([f"errors of a run that was done: {self.errors}"] if lines else [])
        if self.code != 1:
            found.append(f"code {self.code}")
        if not lines or not LAST.fullmatch(lines[-1]):
            found.append(f"last line: {self.errors[-500:]!r}")
        said = [line for line in lines[:-1] if "stopping after the round under way" not in line]
        return found + ([f"more lines: {self.errors[-2000:]!r}"] if said else [])


def stopped(
    arguments: Sequence[object],
    wait: Callable[[Any], object],
    signals: Sequence[signal.Signals],
    pause: float = 0.1,
    start: Callable[..., Any] = Forked,
) -> Ended:
    """Start a command, ``wait(process)``, send the signals with pauses between them, and see how it ends."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = start(arguments, out, errors)
        wait(process)
        started = family(process.pid)
        for number in signals:
            process.send_signal(number)
            time.sleep(pause)
        code = process.wait(600)
        deadline = time.monotonic() + 30
        while (left := [one.title for one in started if alive(one)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        out.seek(0), errors.seek(0)
        return Ended(code, out.read(), errors.read(), left)


def numbers(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what differs from run to run."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("seconds", "warnings")} for line in lines]


def trial(folder: Path, whole: Path, more: Sequence[str], name: str, moment: float, pause: float, start) -> list[str]:
    """Stop one run and resume it; returns what does not hold."""
    run = ["run", *SETTINGS, *more, "--output", folder]
    ended = stopped(run, lambda process: time.sleep(moment), PATTERNS[name], pause, start)
    found = ended.faults(PATTERNS[name])
    if (folder / "config.yaml").exists() and not (folder / "result.json").exists():
        done = stopped(["run", "--resume", "--output", folder, *more], lambda process: None, (), 0, start)
        if done.code or numbers(folder) != numbers(whole):
            found.append(f"resume: code {done.code}, {done.errors[-300:]!r}")
    print(f"{name} at {moment:.2f} s, then every {pause} s: code {ended.code}, {found or 'as it must be'}", flush=True)
    return found


def try_all(moments: int, more: Sequence[str], start: Callable[..., Any]) -> int:
    """Try everything; returns the number of faults."""
    draw, faults = random.Random(0), 0
    with tempfile.TemporaryDirectory() as where:
        whole, begun = Path(where) / "whole", time.monotonic()
        stopped(["run", *SETTINGS, *more, "--output", whole], lambda process: None, (), 0, start)
        lasts = time.monotonic() - begun
        print(f"an uninterrupted run: {lasts:.1f} s", flush=True)
        for name in PATTERNS:
            for number in range(moments):
                folder, moment = Path(where) / f"{name}-{number}", lasts * draw.random()
                faults += bool(trial(folder, whole, more, name, moment, draw.choice([0, 0.05, 0.5]), start))
    return faults


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    on_ray = "--ray" in sys.argv
    import fedprompt.personalization.personalize  # noqa: F401  with everything that a run needs

    how = fresh if on_ray or "--fresh" in sys.argv else Forked
    sys.exit(try_all(given[0] if given else 20, [] if on_ray else ["--local"], how) > 0)
