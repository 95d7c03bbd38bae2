"""A command that is asked to stop, at any time and as often as one likes: one line, code 1, nothing lost or left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stopping
from stopping import HUP, INT, KILL, PATTERNS, TERM

from benchmarks.processes import alive, family

SIGNALS = {"INT": INT, "TERM": TERM, "HUP": HUP}


# --- signals in a small program


def program(text):
    """Python text in a process of its own, once it has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import time\nfrom fedprompt import interrupts\n{text}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


SAVES = """
try:
    with interrupts.terminated_as_interrupt():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("saving", flush=True)
            until = time.monotonic() + 1
            while time.monotonic() < until:
                time.sleep(0.01)
            print("saved", flush=True)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_does_not_disturb_what_the_first_began(first, second):
    process = program(SAVES)
    process.send_signal(SIGNALS[first])
    assert process.stdout.readline() == "saving\n"
    process.send_signal(SIGNALS[second])
    assert ended(process) == (0, "saved\nstopped\n", "")


def test_a_signal_that_was_ignored_from_the_start_stays_ignored():
    process = program("import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SAVES.replace("(60)", "(1)"))
    process.send_signal(HUP)
    assert ended(process) == (0, "saving\nsaved\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_start_ends_it_at_once_with_one_line(number):
    process = program(
        "interrupts.end_at_once('fedprompt: interrupted')\nprint('ready', flush=True)\n"
        "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass  # as C code does\n"
    )
    process.send_signal(SIGNALS[number])
    assert ended(process) == (1, "", "fedprompt: interrupted\n")


def test_what_must_not_be_left_half_done_is_done_first():
    process = program(
        "try:\n    with interrupts.terminated_as_interrupt():\n        with interrupts.deferred():\n"
        "            print('ready', flush=True)\n            until = time.monotonic() + 1\n"
        "            while time.monotonic() < until:\n                time.sleep(0.01)\n"
        "            print('whole', flush=True)\n        time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    process.send_signal(TERM)
    assert ended(process) == (0, "whole\nstopped\n", "")


def test_the_wait_for_a_round_is_cut_short_by_a_second_signal():
    process = program(
        "try:\n    with interrupts.terminated_as_interrupt():\n        try:\n            print('ready', flush=True)\n"
        "            time.sleep(60)\n        except KeyboardInterrupt:\n            interrupts.again()\n"
        "            print('waiting', flush=True)\n            time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped at once')\n"
    )
    process.send_signal(INT)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(INT)
    assert ended(process) == (0, "stopped at once\n", "")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_destructor_stops_the_program_and_leaves_no_traceback(number):
    process = program(
        "class Late:\n    def __del__(self):\n        print('ready', flush=True)\n        time.sleep(60)\n"
        "try:\n    with interrupts.terminated_as_interrupt():\n        Late()\n        time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('stopped')\n"
    )
    process.send_signal(SIGNALS[number])
    assert ended(process) == (0, "stopped\n", "")


# --- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = ["run", *stopping.SETTINGS, "--local", "--output", folder]
    assert stopping.stopped(run, lambda process: None, (), 0).code == 0
    return folder


def after_round(folder, round):
    """Wait until a run has done a round; -1: until it has begun at all."""

    def wait(process):
        lines = folder / ("metrics.jsonl" if round >= 0 else "config.yaml")
        deadline = time.monotonic() + 300
        while not lines.exists() or lines.read_bytes().count(b"\n") <= round:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return wait


@pytest.mark.parametrize(("pattern", "round"), [*((name, 2) for name in PATTERNS), ("INT+INT", 0), ("TERM", -1)])
def test_a_run_that_is_stopped_says_one_line_and_resumes_to_the_same_numbers(whole, tmp_path, pattern, round):
    folder, signals = tmp_path / "run", PATTERNS[pattern]
    run = ["run", *stopping.SETTINGS, "--local", "--output", folder]
    ended = stopping.stopped(run, after_round(folder, round), signals, 0.02)
    assert ended.faults(signals) == []
    again = stopping.stopped(["run", "--resume", "--local", "--output", folder], lambda process: None, (), 0)
    assert (again.code, again.errors) == (0, "")
    assert stopping.numbers(folder) == stopping.numbers(whole)


def imports(process):
    """Wait until it has begun to import what it needs; Python's own start answers a signal in its own way."""
    maps = Path(f"/proc/{process.pid}/maps")
    while "_pydantic_core" not in maps.read_text():
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_command_that_is_interrupted_during_its_imports_says_one_line():
    ended = stopping.stopped(["algorithms"], imports, (INT, INT), 0.05, stopping.fresh)
    assert (ended.code, ended.out, ended.errors) == (1, "", "fedprompt: interrupted\n")


# --- what a killed command leaves behind

HOLDS = """
import subprocess, sys, time
from fedprompt.runtime.ray.leftovers import marked, watched
with watched():
    with marked():
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
    print("ready", flush=True)
    time.sleep(SECONDS)
"""


def gone(process):
    deadline = time.monotonic() + 60
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(process)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [KILL, None])
def test_what_a_command_has_started_ends_with_it_and_nothing_else_does(number):
    process = program(HOLDS.replace("SECONDS", "300" if number else "0.5"))
    watchdog, ours, others = sorted(family(process.pid), key=lambda found: found.began)
    try:
        if number:
            process.send_signal(number)
        process.wait(60)
        assert gone(ours)
        assert gone(watchdog)
        assert alive(others)
    finally:
        os.kill(others.pid, signal.SIGKILL)
        process.communicate()
