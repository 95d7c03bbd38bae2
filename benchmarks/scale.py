"""What a federation's size costs: memory and time of rounds by clients in all and clients per round, on Ray.

FedAvg on prompts of a tiny backbone; every client has five images of Fashion-MNIST, so that only the number of
clients differs between rows. Memory is that of the command and all its processes (Ray's own, too), pages that they
share counted once, at its highest. Then PFPT's server step by clients per round, which is what limits that number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.processes import PATIENCE, Job
from fedprompt.errors import InputError
from fedprompt.programs import program
from fedprompt.tracking import metrics

IMAGES = 5  # per client
ROUNDS = 4  # the first one, which prepares features, does not count
SIZES = ((1_000, 100), (10_000, 100), (1_000, 1_000), (10_000, 1_000))  # clients, clients per round
QUICK_SIZES = ((50, 10), (100, 10))
RUN = (
    *("algorithm.name=fedavg", "backbone.name=test_vit", "backbone.weights=random", "backbone.image_size=32"),
    *("prompt.layer=2", "prompt.length=4", "partition.kind=iid", "partition.min_size=1", "local.epochs=1"),
    *("tracking.tensorboard=false", "runtime.address=local", "runtime.workers=2", "runtime.cpus_per_worker=1"),
    *("runtime.group_size=20", f"federation.rounds={ROUNDS}"),
)
COHORTS, QUICK_COHORTS = (10, 30, 100, 300), (3, 6)
SWEEPS, DEFAULT_SWEEPS = 2, 50
# One server step in a process of its own, which tells its seconds and the bytes that it took at most.
STEP = """
import json, resource, sys, time
import numpy as np, torch
from fedprompt.algorithms.pfpt.set_aggregation import GenerativeSettings, aggregate_sets
torch.set_num_threads(1)
clients, sweeps, schedule = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rng = np.random.default_rng(0)
base = rng.normal(scale=0.05, size=(20, 384))
sets = torch.from_numpy(base + rng.normal(scale=0.005, size=(clients, 20, 384))).float()  # [C, n, D]
aggregate_sets(sets[:2], GenerativeSettings(schedule=schedule, sweeps=1), rng)  # what the first call costs besides
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
aggregate_sets(sets, GenerativeSettings(schedule=schedule, sweeps=sweeps), rng)
seconds = time.perf_counter() - start
more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds_per_sweep": seconds / sweeps, "megabytes": more / 1024}))
"""


def main(json_path: Path | None, quick: bool = False) -> None:
    """Measure and print; ``quick`` is a small case that shows that it works."""
    if not Path("/proc/self/smaps_rollup").exists():
        raise InputError("benchmarks.scale: needs Linux, which tells what memory processes share")
    click.echo("FedAvg: clients  per round  peak memory  train, aggregate, evaluate (s, median of rounds)")
    runs = []
    for clients, cohort in QUICK_SIZES if quick else SIZES:
        runs.append(row := _run(clients, cohort, "digits" if quick else "fashion-mnist"))
        times = "".join(f"{row[stage]:>9.2f}" for stage in ("train", "aggregate", "evaluate"))
        click.echo(f"{clients:>15,}{cohort:>11,}{row['peak_megabytes']:>10.0f} MB{times}")
    click.echo("PFPT's server step, 20 prompts of width 384, one thread, seconds for 50 sweeps and memory:")
    click.echo("        per round      sequential           joint")
    steps = []
    for clients in QUICK_COHORTS if quick else COHORTS:
        both = {schedule: _step(clients, schedule) for schedule in ("sequential", "joint")}
        steps.append({"clients": clients, **both})
        told = (f"{s['seconds_per_sweep'] * DEFAULT_SWEEPS:>9.1f} s {s['megabytes']:>5.0f} MB" for s in both.values())
        click.echo(f"{clients:>17,}{''.join(told)}")
    if json_path is not None:
        json_path.write_text(json.dumps({"fedavg": runs, "pfpt_server_step": steps}, indent=1) + "\n")


def _run(clients: int, cohort: int, data: str) -> dict[str, Any]:
    """One run in processes of its own, watched to its end."""
    with tempfile.TemporaryDirectory(prefix="scale-", dir="/tmp") as folder:  # short: Ray makes sockets below
        output, log = Path(folder) / "run", Path(folder) / "log.txt"
        sizes = (f"federation.clients={clients}", f"federation.cohort={cohort}", f"data.limit={_images(clients)}")
        command = [sys.executable, "-m", "fedprompt", "run", "--output", str(output), f"data.name={data}"]
        environment = {**os.environ, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        job, peak, until = Job([*command, *RUN, *sizes], environment, log), 0, time.monotonic() + PATIENCE
        try:
            while job.running() and time.monotonic() < until:
                peak = max(peak, job.memory())
                time.sleep(0.2)
            if job.running() or job.wait():
                raise InputError(f"benchmarks.scale: {job.last_line()}")
        finally:
            job.kill()
        rounds = [record["seconds"] for record in metrics.read(output / "metrics.jsonl") if record["round"] > 1]
    stages = {stage: float(np.median([r[stage] for r in rounds])) for stage in ("train", "aggregate", "evaluate")}
    return {"clients": clients, "cohort": cohort, "peak_megabytes": peak / 2**20, **stages}


def _images(clients: int) -> int:
    """So many that five are left for every client when the validation split is held out."""
    from fedprompt.config.schema import DataSection

    return round(IMAGES * clients / (1 - DataSection().validation))


def _step(clients: int, schedule: str) -> dict[str, float]:
    """One server step in a process of its own."""
    command = [sys.executable, "-c", STEP, str(clients), str(SWEEPS), schedule]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    program(main)
