"""The benchmark of memory: its images are what it says, and parts of a run make up the whole."""

import os
import sys

import numpy as np
import pytest
from commands import ready_job

from benchmarks.memory import Size, write_images
from fedprompt.data import load

TWO = """
import subprocess, sys, time
command = [sys.executable, "-c", "own = b'y' * 30_000_000; print('ready', flush=True); import time; time.sleep(300)"]
subprocess.run([*command, "worker"])
"""


def test_its_images_are_a_data_set_of_that_size(tmp_path):
    size = Size(train=20, test=10, side=40)
    write_images(tmp_path, size)
    found = load("cinic10", str(tmp_path))
    assert found.train.inputs.array.nbytes + found.test.inputs.array.nbytes == size.bytes
    assert found.train.inputs.array.shape == (20, 40, 40, 3)
    assert np.bincount(found.train.labels).tolist() == [2] * 10
    assert len(np.unique(found.train.inputs.array, axis=0)) == 20


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_memory_is_told_by_part(tmp_path):
    job = ready_job(TWO, tmp_path / "log.txt")
    try:
        parts = job.memory_by({sys.executable: "child"}, "rest")
        assert parts.keys() == {"command", "child"}
        assert 30e6 < parts["child"] < 60e6
        assert 2e6 < parts["command"] < 30e6
        assert job.memory_by({"nobody": "child"}, "rest").keys() == {"command", "rest"}
    finally:
        job.kill()
