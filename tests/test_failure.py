"""Whatever fails in a command: one line with its kind, and a file that holds traceback and configuration."""

import re
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from commands import cli
from tiny import TINY

from fedprompt import registry
from fedprompt.config.parsing import load
from fedprompt.failure import told, told_in_one_line
from fedprompt.models.weights import named as weights
from fedprompt.personalization import personalize
from fedprompt.reports import report
from fedprompt.runtime import build
from fedprompt.runtime import run as running
from fedprompt.runtime.serving import http_service
from fedprompt.runtime.worker import Worker
from fedprompt.sweeps import sweep

FAST = [*TINY, "algorithm.name=fedavg", "data.limit=120", "partition.min_size=1", "federation.rounds=1"]
LINE = re.compile(r"fedprompt: failed \(ZeroDivisionError: first line\); all of it in (\S+)\n")


def faulty(*arguments, **options):
    raise ZeroDivisionError("first line\nsecond \x1b[31mline")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert cli("run", *FAST, "--local", "--output", folder) == 0
    return folder


SWEEP = "base: {seed: 3}\nspace: {algorithm.name: {grid: [fedavg]}}\n"
COMMANDS = {
    "run, training": (["run", *FAST, "--local", "--output", "out"], Worker, "train", "rounds: 1"),
    "run, data": (["run", *FAST, "--local", "--output", "out"], running, "build_data", "rounds: 1"),
    "run, before it has a folder": (["run", *FAST, "--local"], running, "default_output", "fedprompt run"),
    "partition": (["partition", *FAST], build, "divided_data", "fedprompt partition"),
    "algorithms": (["algorithms"], registry, "tell_broken", "fedprompt algorithms"),
    "datasets": (["datasets"], registry, "tell_broken", "fedprompt datasets"),
    "backbones": (["backbones"], weights, "available", "fedprompt backbones"),
    "sweep": (["sweep", "sweep.yaml"], sweep, "connected", "seed: 3"),
    "personalize": (["personalize", "RUN", "--local", "--output", "out"], personalize, "personalize", "fedavg"),
    "report": (["report", "RUN", "--output", "out"], report, "find", "fedprompt report"),
    "serve": (["serve", *FAST, "algorithm.name=fedbbpt"], http_service, "opened", "algorithm:"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_fault_of_ours_is_one_line_in_every_command(case, finished, tmp_path, monkeypatch, capsys):
    arguments, place, name, configuration = COMMANDS[case]
    arguments = [str(finished) if argument == "RUN" else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(SWEEP)
    monkeypatch.setattr(place, name, faulty)
    monkeypatch.setattr("sys.argv", ["fedprompt", *arguments])
    assert cli(*arguments) == 1
    errors = capsys.readouterr().err
    found = LINE.fullmatch(errors)
    assert found, errors
    details = Path(found[1])
    assert (details == Path("out/error.txt")) == Path("out").exists()
    text = details.read_text()
    assert "Traceback" in text
    assert "second" in text
    assert configuration in text


@pytest.mark.ray
def test_a_fault_of_the_driver_or_of_a_trial_is_one_line(tmp_path, monkeypatch):
    from fedprompt.runtime.ray import driver

    monkeypatch.setattr(driver, "build_data", faulty)
    records = list(driver.Driver(load(None, FAST), str(tmp_path), None).run())
    line = f"failed (ZeroDivisionError: first line); all of it in {tmp_path}/error.txt"
    assert records[-1] == {"error": line, "code": 1}
    assert "rounds: 1" in (tmp_path / "error.txt").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, click.Abort, click.UsageError("no")])
def test_what_is_no_fault_stays_what_it_is(error, tmp_path):
    with pytest.raises(error if isinstance(error, type) else type(error)), told_in_one_line(tmp_path):
        raise error
    assert not list(tmp_path.iterdir())


class Panic(BaseException):
    """As extensions in Rust raise: no Exception."""


class Mute(Exception):
    """Cannot even say what it is."""

    def __str__(self):
        raise ValueError


@pytest.mark.parametrize("error", [Panic("gone"), Mute(), RecursionError("deep"), AssertionError()])
def test_every_kind_of_error_has_its_line(error, tmp_path):
    line = told(error, tmp_path)
    assert line["code"] == 1
    assert type(error).__name__ in line["error"]
    assert "\n" not in line["error"]


def too_large_for_torch():
    torch.empty(2**50)


def too_large_for_numpy():
    np.empty(2**50)


def too_large_for_python():
    raise MemoryError


def too_large_for_the_system():
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize(
    "allocate", [too_large_for_torch, too_large_for_numpy, too_large_for_python, too_large_for_the_system]
)
def test_a_lack_of_memory_names_the_keys_that_may_help(allocate, tmp_path):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        allocate()
    line = told(caught.value, tmp_path)["error"]
    assert line.startswith("out of memory (")
    for key in ("local.batch_size", "runtime.group_size", "backbone.image_size"):
        assert key in line


def test_details_go_into_a_temporary_file_where_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "error.txt").mkdir()
    line = told(ZeroDivisionError("why"), tmp_path, "seed: 1")["error"]
    written = Path(line.rpartition(" ")[2])
    assert written.parent != tmp_path
    assert "seed: 1" in written.read_text()
    written.unlink()
