"""What our own processes do to their memory."""

import json
import platform
import subprocess
import sys

import pytest

# In processes of their own: what other tests have left in the heap of this one decides where a tensor comes to lie.
# Where the system has put something else behind the heap, as it may, nothing is kept: then another process is asked.
TRIES = 10
FAULTS = """
import json, resource, torch
from fedprompt import allocation

allocation.prepare()

def faults_of(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(size, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

MB = 2**20
for _ in range(3):
    faults_of(64 * MB)
print(json.dumps([faults_of(64 * MB), faults_of(512 * MB), faults_of(512 * MB)]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_an_activations_memory_is_kept_and_a_datasets_is_given_back():
    def faults():
        printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
        return json.loads(printed)

    found = next((seen for seen in (faults() for _ in range(TRIES)) if seen[0] < 64), None)
    assert found is not None, "memory that was freed is used again"
    _, first, again = found
    assert again >= first / 2 > 0, "what is larger than any activation is mapped anew each time"
