"""What does the fused cohort buy? One round of the same cohort, as one group and client after client, in turn.

Both ways train the same clients on the same batches with the same dropout, so their params differ only by the order in
which floating-point numbers are added up. (Where prompts of a pool have equal votes, that order may also decide which
of them is selected; then the largest difference is that of a different choice.)

A second ratio tells what it buys to keep the tokens before block ``prompt.layer``: the same fused round once more,
with the blocks below it run again in every step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.training import raw_examples
from benchmarks.turns import in_turn, ratio
from fedprompt.client.examples import Examples
from fedprompt.client.tasks import Task, Update
from fedprompt.config import parsing as config
from fedprompt.models.model import torch_device
from fedprompt.programs import program
from fedprompt.runtime.build import build_data, worker_parts
from fedprompt.runtime.worker import Worker

FULL = ("data.limit=1500", "federation.clients=10", "federation.cohort=10")
QUICK = ("data.limit=120", "federation.clients=3", "federation.cohort=3")
BOTH = ("backbone.image_size=42", "prompt.kind=pool", "prompt.layer=10", "local.epochs=1", "runtime.precision=float32")

FUSED, ALONE, RECOMPUTED = "fused", "client after client", "fused, tokens recomputed"


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print the times of the three ways in turn, their ratios, and the largest difference of any trained parameter.

    Takes a few minutes on one core. ``quick`` trains three small clients once, which shows only that everything works.
    """
    settings = config.load(None, [*(QUICK if quick else FULL), *BOTH])
    data = build_data(settings)
    worker = Worker(worker_parts(settings, data), torch.get_num_threads())
    start = worker.facts().params
    tasks = [Task(client, start, settings.local.epochs) for client in range(len(data.clients))]
    raw = [raw_examples(data.client(task.client)) for task in tasks]
    kept, queries = ([worker.prepare(own, own.inputs, keep) for own in raw] for keep in (True, False))
    inputs = [own.inputs for own in raw]
    ways = {
        FUSED: lambda: worker.train(0, tasks, *kept),
        ALONE: lambda: _alone(worker, tasks, kept),
        RECOMPUTED: lambda: worker.train(0, tasks, *queries, *inputs),
    }
    times, updates = in_turn(ways, turns=1 if quick else 5)  # each ends with its params on the CPU: a GPU has finished
    steps = [update.steps for update in updates[FUSED]]
    print(
        f"{len(tasks)} clients, {min(steps)} to {max(steps)} steps of up to {settings.local.batch_size} images", end=""
    )
    print(f"; {torch_device()}, {torch.get_num_threads()} thread(s)")
    for name, seconds in times.items():
        print(f"  {name:<26}{median(seconds):7.2f} s  ({', '.join(f'{s:.2f}' for s in seconds)})")
    result = {
        "speed_ratio": ratio(times[ALONE], times[FUSED]),
        "largest_difference": largest_difference(updates[FUSED], updates[ALONE]),
        "cache_ratio": ratio(times[RECOMPUTED], times[FUSED]),
    }
    print(f"fused is {result['speed_ratio']:.2f} times as fast as client after client")
    print(f"largest difference of any parameter: {result['largest_difference']:.1e} (float32)")
    print(f"kept tokens make the fused round {result['cache_ratio']:.2f} times as fast as recomputed ones")
    if json_path is not None:
        facts = {"clients": len(tasks), "steps": steps, "device": str(torch_device()), "seconds": times}
        json_path.write_text(json.dumps({**result, **facts, "threads": torch.get_num_threads()}, indent=1) + "\n")


def largest_difference(one: Sequence[Update], other: Sequence[Update]) -> float:
    """Largest absolute difference of any parameter between two lists of updates of the same clients."""
    return max(
        float((value - b.params[name]).abs().max())
        for a, b in zip(one, other, strict=True)
        for name, value in a.params.items()
    )


def _alone(worker: Worker, tasks: Sequence[Task], examples: Sequence[Examples]) -> list[Update]:
    """Train groups of one."""
    return [worker.train(0, [task], own)[0] for task, own in zip(tasks, examples, strict=True)]


if __name__ == "__main__":
    program(main)
