"""Federated prompt tuning of a frozen Vision Transformer, simulated."""

import os

__version__ = "0.1.0"

# Large tensors on Linux's large pages, before torch first asks for memory: otherwise each step on a CPU pays for
# thousands of page faults. A value that is set already stays.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
