"""The benchmark of faults: it plans what a run can bear, kills nothing but what it started, and notices differences."""

import os
import subprocess
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import ready_job

from benchmarks import faults, processes

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")


def test_all_faults_are_planned_and_no_run_has_more_than_it_can_bear():
    for seed in range(5):
        runs = faults.plan(faults.COUNTS, np.random.default_rng(seed))
        assert Counter(kind for run in runs for kind in run) == faults.COUNTS
        assert all(len(run) <= faults.PER_RUN for run in runs)
    runs = faults.plan({"worker killed": 9, "driver killed": 2}, np.random.default_rng(0))
    assert all(faults._bearable(run) for run in runs)
    assert not faults._bearable(["worker killed"] * 4)
    assert faults._bearable(
        ["worker killed"] * 3 + ["driver killed", "worker killed", "SIGTERM"] + ["driver killed"] * 3
    )


def test_there_are_fifty_faults_and_a_way_to_make_each():
    assert sum(faults.COUNTS.values()) == 50
    assert faults.COUNTS.keys() == faults.FAULTS.keys()


@pytest.fixture
def bystander():
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()


def start_family(log):
    """A command that starts others: one in its own session, and one that starts one more."""
    program = """
import subprocess, time
subprocess.Popen(["sleep", "301"], start_new_session=True)
subprocess.Popen(["sh", "-c", "sleep 302; true"])
print("ready", flush=True)
time.sleep(300)
"""
    return ready_job(program, log, started=3)


def test_killing_a_job_ends_all_that_it_started_and_nobody_else(tmp_path, bystander):
    job = start_family(tmp_path / "log.txt")
    started = processes.family(job._command.pid)
    titles = [process.title for process in started]
    assert sorted(title for title in titles if title.startswith("sleep")) == ["sleep 301", "sleep 302"]
    assert all(processes.alive(process) for process in started)
    job.kill()
    assert not any(processes.alive(process) for process in started)
    assert not job.running()
    assert bystander.poll() is None


def test_a_later_process_with_the_same_number_is_spared(bystander):
    (process,) = [p for p in processes.family(os.getpid()) if p.pid == bystander.pid]
    processes.kill(replace(process, began=process.began - 1))
    time.sleep(0.1)
    assert bystander.poll() is None
    processes.kill(process)
    assert bystander.wait(30) == -9
    processes.kill(process)  # it is gone: nothing happens


def test_any_other_bit_is_noticed():
    expected = ({"prompt": torch.ones(3)}, [{"round": 0}], {"final": {"accuracy": 0.5}})
    assert faults._difference(expected, expected) == ""
    nearly = {"prompt": torch.tensor([1, 1, 1 + 1e-7])}
    assert faults._difference((nearly, *expected[1:]), expected) == "other params"
    assert faults._difference((expected[0], [], expected[2]), expected) == "other metrics"
    assert faults._difference((*expected[:2], {"final": {"accuracy": 0.6}}), expected) == "another result"
