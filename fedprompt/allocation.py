"""How a process of ours asks the system for memory: what a training step frees is kept for the next step.

Importing fedprompt changes nothing. The command, Ray's workers and the programs of studies and benchmarks call
``prepare`` when they start; a process of the user's, such as a notebook, is left as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of glibc's mallopt, as its malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MB = 1 << 20


def prepare() -> None:
    """Keep freed memory in this process, and put large tensors on Linux's large pages.

    Without it every training step on a CPU pays for thousands of page faults. A value of THP_MEM_ALLOC_ENABLE that is
    set already stays; torch reads it at its first large allocation. Other C libraries than glibc are left as they are.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # By default each tensor of more than 32 MB is a mapping of its own, and other threads' pieces end at 64 MB.
        # What is larger than any activation, as a data set is, still goes back at once.
        mallopt(_MMAP_THRESHOLD, 256 * _MB)
        mallopt(_TRIM_THRESHOLD, 1024 * _MB)
        mallopt(_ARENA_MAX, 1)
