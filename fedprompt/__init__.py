"""Federated prompt tuning of a frozen Vision Transformer, simulated."""

import ctypes
import os
import sys

__version__ = "0.2.0"

# Parameters of glibc's mallopt, as its malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MB = 1 << 20


def _keep_freed_memory() -> None:
    """Have the C library keep what a training step frees, for the next step: as given back, it costs page faults again.

    Otherwise each tensor of more than 32 MB is a mapping of its own, and other threads' pieces end at 64 MB. What is
    larger than any activation, as a dataset is, still goes back at once. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 256 * _MB)
        mallopt(_TRIM_THRESHOLD, 1024 * _MB)
        mallopt(_ARENA_MAX, 1)


# Large tensors on Linux's large pages, before torch first asks for memory: otherwise each step on a CPU pays for
# thousands of page faults. A value that is set already stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
_keep_freed_memory()
