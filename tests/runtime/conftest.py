"""A tiny experiment, and what there is to compare of two runs of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY

from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.models.params import Params
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking import metrics

THREE_ROUNDS = [*TINY, "federation.rounds=3"]
QUICK_MATCHING = "algorithm.sweeps=3"


def tiny_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides of a tiny experiment; PFPT with few sweeps unless another method is asked for."""
    other = any(override.startswith("algorithm.name=") for override in overrides)
    return [*THREE_ROUNDS, *([] if other else [QUICK_MATCHING]), *overrides]


class Runs:
    """Makes tiny runs, each in a folder of its own, and looks at what they left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, *overrides: str) -> Config:
        """A tiny experiment."""
        return load(None, tiny_overrides(overrides))

    def local(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """Run (or, where it has begun, continue) in this process; the last record has the result."""
        return list(run_in_process(self.config(*overrides), self.folder / name))

    def params(self, name: str) -> Params:
        """Params in the newest checkpoint."""
        return self.state(name).params

    def state(self, name: str) -> Any:
        """State in the newest checkpoint."""
        return CheckpointStore(str(self.folder / name / "checkpoints")).latest().state

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl without what a clock says."""
        records = metrics.read(self.folder / name / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    def command(self, name: str, *arguments: str) -> list[str]:
        """The command line of a tiny run in a process of its own."""
        return [*COMMAND, "run", *tiny_overrides(arguments), "--output", str(self.folder / name)]


COMMAND = [sys.executable, "-m", "fedprompt"]


def same(first: Params, second: Params) -> bool:
    """Whether two params are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def start(command: Sequence[str]) -> subprocess.Popen:
    """Start a command with its output kept; it hears signals even where tests run in the background or by nohup."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=environment, preexec_fn=_hear_signals)


def _hear_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def runs(tmp_path) -> Runs:
    """Runs in this test's folder."""
    return Runs(tmp_path)


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> Runs:
    """Runs in a folder that all tests of a file look at."""
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def same_params() -> Callable[[Params, Params], bool]:
    """Compare params bit for bit."""
    return same


@pytest.fixture(scope="session")
def start_process() -> Callable[[Sequence[str]], subprocess.Popen]:
    """Start a command with its output kept."""
    return start


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread, as in worker processes: then results agree bit for bit."""
    torch.set_num_threads(1)
