"""Times, rates and waits on a device that works while the host goes on; also on a CPU. Needs nothing but torch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch


def matrix_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a product of two random square matrices: median of ten, each of ten products."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            a @ b

    _, *seconds = timed(ten, 10, device)
    return 10 * 2 * size**3 / median(seconds)


def timed(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of a first run, which warms up, and of each repetition; a GPU has finished before either reading."""
    seconds = []
    for _ in range(1 + repeats):
        _synchronize(device)
        begun = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """With float32 matrix products "highest" or, in TF32 where there is a GPU, "high"."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def waits_per_step(train: Callable[[int], None], steps: int) -> float:
    """How often the host waits for the GPU within a step, as torch counts: what a second epoch of ``steps`` adds."""
    counts = []
    for epochs in (1, 2):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(epochs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(warning.message) for warning in seen))
    return (counts[1] - counts[0]) / steps
