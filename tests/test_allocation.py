"""What importing fedprompt does to the process's memory."""

import json
import platform
import subprocess
import sys

import pytest

# In a process of its own: what other tests have left in the heap of this one decides where a tensor comes to lie.
FAULTS = """
import json, resource, torch
import fedprompt  # its import sets how the C library keeps memory

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
    printed = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, first, again = json.loads(printed)
    assert kept < 64, "memory that was freed is used again"
    assert again >= first / 2 > 0, "what is larger than any activation is mapped anew each time"
