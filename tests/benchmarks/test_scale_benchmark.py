"""The benchmark of sizes: what it counts as memory, and that a server step is measured in a process of its own."""

import os

import pytest
from commands import ready_job

from benchmarks import scale

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
SHARING = """
import mmap, os, time
shared = mmap.mmap(-1, 60_000_000)
shared.write(b"x" * 60_000_000)
if os.fork() == 0:
    sum(shared[::4096])
    own = b"y" * 30_000_000
    print("ready", flush=True)
time.sleep(300)
"""


def test_memory_is_that_of_all_processes_with_what_they_share_once(tmp_path):
    job = ready_job(SHARING, tmp_path / "log.txt")
    try:
        assert 90e6 < job.memory() < 140e6
    finally:
        job.kill()
    assert job.memory() == 0


def test_every_client_has_as_many_images_whatever_their_number():
    for clients in (50, 1_000, 10_000):
        images = scale._images(clients)
        assert (images - round(0.1 * images)) // clients == scale.IMAGES


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_a_server_step_of_pfpt_is_timed(schedule):
    measured = scale._step(2, schedule)
    assert measured["seconds_per_sweep"] > 0
    assert measured["megabytes"] >= 0
