"""What a run takes of its host's memory: the demo, and a federation of 20,000 images of 224 pixels, on Ray.

The images are made up (smooth noise) and written as JPEG files in the layout of CINIC-10, whose loader takes any size;
so nothing but their number and size matters, and the way from files to workers is a user's. Their federation has 20
clients, five per round, for two rounds; prompts enter before the first block of a tiny backbone at 224 pixels, so that
every step needs the images themselves: no kept tokens take their place.

Counted is, every fifth of a second, what the command and everything that it has started hold, Ray's own processes and
its object store too; pages that they share count once. The limit is the size of all images as they are held (uint8,
training and test) plus 1.5 GB per worker. "Ray" are its own processes: what it takes before any of ours is there.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from benchmarks.processes import PATIENCE, Job
from fedprompt.data.sources.folders import CINIC_CLASSES
from fedprompt.errors import InputError
from fedprompt.programs import program

WORKERS = 2
PER_WORKER = 1.5e9  # bytes beside the data
DEMO_IMAGES = 10_000 * 28 * 28  # bytes
COMMON = (
    *("federation.rounds=2", f"runtime.workers={WORKERS}", "runtime.cpus_per_worker=1", "runtime.address=local"),
    "tracking.tensorboard=false",
)
TINY = ("backbone.name=test_vit", "backbone.weights=random", "prompt.layer=0", "local.epochs=1", "algorithm.sweeps=3")
PARTS = {"ray::Driver": "driver", "ray::Worker": "workers"}  # of a run, by the titles of their processes


@dataclass(frozen=True)
class Size:
    """How many images, and their side in pixels."""

    train: int
    test: int
    side: int

    @property
    def bytes(self) -> int:
        """Of all images in colour, a byte per value."""
        return (self.train + self.test) * self.side * self.side * 3


LARGE, QUICK = Size(18_000, 2_000, 224), Size(600, 100, 32)


def main(json_path: Path | None, quick: bool = False) -> None:
    """Measure and print; ``quick`` is a small case that shows that it works."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise InputError("benchmarks.memory: needs Linux, which tells what memory processes share")
    size = QUICK if quick else LARGE
    click.echo(f"megabytes at the peak, {WORKERS} workers{'data':>14}{'peak':>8}{'limit':>8}   of the peak:")
    with tempfile.TemporaryDirectory(prefix="memory-", dir="/tmp") as folder:  # short: Ray makes sockets below
        images = Path(folder) / "images"
        write_images(images, size)
        large = (f"data.root={images}", "data.name=cinic10", f"backbone.image_size={size.side}", *TINY)
        rows = [_row("demo", DEMO_IMAGES, Path(folder), ("data.limit=500",) if quick else ())]
        rows.append(_row(f"{size.train + size.test:,} of {size.side} px", size.bytes, Path(folder), large))
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")


def write_images(folder: Path, size: Size) -> None:
    """Write smooth noise as ``folder/train/CLASS/*.jpg`` and ``folder/test/CLASS/*.jpg``, classes in turn."""
    rng = np.random.default_rng(0)
    for part, count in (("train", size.train), ("test", size.test)):
        for name in CINIC_CLASSES:
            (folder / part / name).mkdir(parents=True)
        for i in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            name = CINIC_CLASSES[i % len(CINIC_CLASSES)]
            noise.resize((size.side, size.side)).save(folder / part / name / f"{i:06}.jpg")


def _row(name: str, data: int, folder: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Watch one run, print its line and return its numbers in megabytes."""
    parts = _peak(folder, overrides)
    limit = data + WORKERS * PER_WORKER
    row = {"case": name, "data": data, "peak": sum(parts.values()), "limit": limit, "parts": parts}
    told = ", ".join(f"{part} {held / 1e6:.0f}" for part, held in parts.items())
    click.echo(f"{name:<33}{data / 1e6:>14.0f}{row['peak'] / 1e6:>8.0f}{limit / 1e6:>8.0f}   {told}")
    return row


def _peak(folder: Path, overrides: tuple[str, ...]) -> dict[str, int]:
    """Run in processes of its own; bytes by part of the run when they were most in all."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        log, output = Path(place) / "log.txt", Path(place) / "run"
        command = [sys.executable, "-m", "fedprompt", "run", "--output", str(output), *COMMON, *overrides]
        environment = {**os.environ, "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        job, most, until = Job(command, environment, log), {}, time.monotonic() + PATIENCE
        try:
            while job.running() and time.monotonic() < until:
                now = job.memory_by(PARTS, "Ray")
                most = max(most, now, key=lambda parts: sum(parts.values()))
                time.sleep(0.2)
            if job.running() or job.wait():
                raise InputError(f"benchmarks.memory: {job.last_line()}")
        finally:
            job.kill()
    return most


if __name__ == "__main__":
    program(main)
