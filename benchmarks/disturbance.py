"""Runs on Ray that may be disturbed, and the ways to disturb them: what the benchmark of faults is made of."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import processes
from benchmarks.processes import PATIENCE, Job
from fedprompt.models.params import Params
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.tracking import metrics

RUN = (
    *("backbone.name=test_vit", "backbone.weights=random", "backbone.image_size=32", "prompt.layer=2"),
    *("prompt.pool_size=6", "prompt.top_k=3", "algorithm.sweeps=10", "data.name=digits", "data.limit=500"),
    *("partition.min_size=4", "federation.clients=6", "federation.cohort=4", "tracking.tensorboard=false"),
    *("runtime.address=local", "runtime.workers=2", "runtime.cpus_per_worker=0.5", "runtime.group_size=1"),
)
LARGEST = 100_000  # bytes of a file on the full disk: less than a checkpoint, more than metrics.jsonl

Outcome = tuple[Params, list[Any], dict[str, Any]]  # params, lines of metrics.jsonl, result


class Lost(Exception):
    """A run did not do what it should have: one line that says what."""


class Run:
    """A run in a folder, in which it may be stopped and resumed."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.output, self.job, self._rounds, self._before = folder / "run", None, rounds, -1
        self._log = folder / "log.txt"
        self._environment = {**os.environ, "RAY_TMPDIR": str(folder.parent), "OMP_NUM_THREADS": "1"}
        folder.mkdir(parents=True)
        self.begin(*RUN, f"federation.rounds={rounds}")

    def begin(self, *arguments: str) -> None:
        """Start the command: a new run, or with ``--resume`` the rest of it."""
        self._before = self.round()
        command = [sys.executable, "-m", "fedprompt", "run", "--output", str(self.output), *arguments]
        self.job = Job(command, self._environment, self._log)

    def round(self) -> int:
        """The last round that is recorded; -1 where none is."""
        path = self.output / "metrics.jsonl"
        return max((record["round"] for record in metrics.read(path)), default=-1) if path.exists() else -1

    def wait_for(self, round: int) -> None:
        """Wait until a round is recorded, and one by the present command; raises Lost where that ends before."""
        until, round = time.monotonic() + PATIENCE, min(max(round, self._before + 1), self._rounds)
        while (now := self.round()) < round:
            if not self.job.running() or time.monotonic() > until:
                raise Lost(f"came to round {now} instead of {round}: {self.job.last_line()}")
            time.sleep(0.02)

    def ended(self, *codes: int) -> None:
        """Wait for the end; raises Lost where the exit code is none of ``codes``."""
        try:
            code = self.job.wait()
        except subprocess.TimeoutExpired:
            raise Lost(f"did not end: {self.job.last_line()}") from None
        if code not in codes:
            raise Lost(f"ended with code {code}: {self.job.last_line()}")

    def outcome(self) -> Outcome:
        """Params, lines and result, without clocks and warnings."""
        lines = metrics.read(self.output / "metrics.jsonl")
        result = json.loads((self.output / "result.json").read_text())
        params = CheckpointStore(str(self.output / "checkpoints")).latest().state.params
        return params, [_without(line, "seconds", "warnings") for line in lines], _without(result, "seconds")


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


# --- the faults


def _kill_one(actor: str) -> Callable[[Run, np.random.Generator], None]:
    def fault(run: Run, rng: np.random.Generator) -> None:
        victims = run.job.actors(actor)
        if not victims:
            raise Lost(f"has no process of {actor}")
        processes.kill(victims[rng.integers(len(victims))])

    return fault


def _kill_all(run: Run, rng: np.random.Generator) -> None:
    run.job.kill()
    run.begin("--resume")


def _stop_by(number: signal.Signals) -> Callable[[Run, np.random.Generator], None]:
    def fault(run: Run, rng: np.random.Generator) -> None:
        run.job.signal(number)
        run.ended(1)
        run.begin("--resume")

    return fault


def _cut_off(run: Run, rng: np.random.Generator) -> None:
    run.job.kill()
    newest = max((run.output / "checkpoints").glob("round_*.pt"))
    os.truncate(newest, int(rng.integers(newest.stat().st_size)))
    run.begin("--resume")


def _fill_disk(run: Run, rng: np.random.Generator) -> None:
    """Let the driver write no file as large as a checkpoint."""
    drivers = run.job.actors("Driver")
    if not drivers:
        raise Lost("has no process of Driver")
    hard = resource.prlimit(drivers[-1].pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(drivers[-1].pid, resource.RLIMIT_FSIZE, (LARGEST, hard))
    run.ended(1)
    run.begin("--resume")


FAULTS: dict[str, Callable[[Run, np.random.Generator], None]] = {
    "worker killed": _kill_one("Worker"),
    "driver killed": _kill_one("Driver"),
    "all processes killed": _kill_all,
    "SIGTERM": _stop_by(signal.SIGTERM),
    "SIGINT": _stop_by(signal.SIGINT),
    "newest checkpoint cut off": _cut_off,
    "disk full": _fill_disk,
}
