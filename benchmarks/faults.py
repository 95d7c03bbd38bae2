"""Faults at random moments of runs on Ray, and whether the runs come to what undisturbed ones come to, bit for bit.

A tiny run (random ViT, digits) is disturbed every third round: processes are killed, the command is stopped, or dies
with all that it started, checkpoints are truncated while it is down, and files grow too large for the system. What ends
the command is followed by ``--resume``. A run is compared with an undisturbed one: params, every line of metrics.jsonl,
and result.json, but for clocks and warnings. Where it differs, all its faults count as lost.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch

from benchmarks.disturbance import FAULTS, Lost, Outcome, Run
from fedprompt.errors import InputError
from fedprompt.programs import program
from fedprompt.runtime.ray.on_ray import DRIVER_RESTARTS
from fedprompt.runtime.ray.pool import RESTARTS

PER_RUN = 8  # faults
EVERY = 3  # rounds: one to be disturbed in, and two to see what becomes of it
COUNTS = {  # 50 in all
    "worker killed": 15,
    "driver killed": 12,
    "all processes killed": 6,
    "SIGTERM": 5,
    "SIGINT": 4,
    "newest checkpoint cut off": 5,
    "disk full": 3,
}


def plan(counts: dict[str, int], rng: np.random.Generator) -> list[list[str]]:
    """Kinds of faults in random order, cut into runs; never more kills than Ray is told to restart after."""
    left = [str(kind) for kind in rng.permutation([kind for kind, count in counts.items() for _ in range(count)])]
    runs: list[list[str]] = []
    while left:
        run: list[str] = []
        while len(run) < PER_RUN and (kind := next((kind for kind in left if _bearable([*run, kind])), None)):
            run.append(kind)
            left.remove(kind)
        runs.append(run)
    return runs


def _bearable(kinds: list[str]) -> bool:
    workers = drivers = 0
    for kind in kinds:
        if kind == "worker killed":
            workers += 1
        elif kind == "driver killed":
            workers, drivers = 0, drivers + 1
        else:  # a new command
            workers = drivers = 0
    return workers <= RESTARTS and drivers <= DRIVER_RESTARTS


# --- runs with and without


@dataclass(frozen=True)
class Fault:
    """A fault, what was lost by it ('' for nothing), and the seconds that it cost (None where that is not known)."""

    kind: str
    lost: str
    seconds: float | None


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nothing happens to comes to."""

    rounds: int
    outcome: Outcome
    per_round: float  # seconds


def undisturbed(folder: Path, rounds: int) -> Undisturbed:
    """Run without any fault."""
    run = Run(folder, rounds)
    try:
        run.wait_for(1)
        begun = time.monotonic()
        run.wait_for(rounds)
        per_round = (time.monotonic() - begun) / (rounds - 1)
        run.ended(0)
        return Undisturbed(rounds, run.outcome(), per_round)
    finally:
        run.job.kill()


def disturbed(folder: Path, kinds: list[str], expected: Undisturbed, rng: np.random.Generator) -> list[Fault]:
    """Let a run go through faults of the given kinds, one every third round."""
    run, seconds = Run(folder, expected.rounds), []
    try:
        for number, kind in enumerate(kinds):
            seconds.append(_one(run, kind, 1 + EVERY * number, expected.per_round, rng))
        run.ended(0)
        lost = _difference(run.outcome(), expected.outcome)
    except Lost as error:
        lost = str(error)
    finally:
        run.job.kill()
    known = [*seconds, *[None] * len(kinds)]
    return [Fault(kind, lost, cost) for kind, cost in zip(kinds, known, strict=False)]


def _one(run: Run, kind: str, round: int, per_round: float, rng: np.random.Generator) -> float:
    """Disturb a run in the round after ``round``; returns how much later than usual the one after that was recorded."""
    run.wait_for(round)
    begun = time.monotonic()
    time.sleep(rng.uniform(0, per_round))
    FAULTS[kind](run, rng)
    run.wait_for(round + 2)
    return max(0.0, time.monotonic() - begun - 2 * per_round)


def _difference(found: Outcome, expected: Outcome) -> str:
    params, should_be = found[0], expected[0]
    if params.keys() != should_be.keys() or any(not torch.equal(params[n], v) for n, v in should_be.items()):
        return "other params"
    if found[1] != expected[1]:
        return "other metrics"
    return "" if found[2] == expected[2] else "another result"


def main(json_path: Path | None, quick: bool = False) -> None:
    """Disturb and print; ``quick`` has one fault of each kind. Ends with code 1 where anything is lost."""
    if not hasattr(os, "pidfd_open"):
        raise InputError("benchmarks.faults: needs Linux, where processes can be told apart for certain")
    counts = dict.fromkeys(COUNTS, 1) if quick else COUNTS
    rng = np.random.default_rng(0)
    runs = plan(counts, rng)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    rounds = 1 + EVERY * max(len(run) for run in runs)
    try:
        expected = undisturbed(folder / "whole", rounds)
    except Lost as error:
        click.echo(f"the undisturbed run {error}; it is in {folder / 'whole'}", err=True)
        sys.exit(1)
    click.echo(f"undisturbed: {rounds} rounds, {expected.per_round:.2f} s each; now {len(runs)} runs with faults")
    faults: list[Fault] = []
    for number, kinds in enumerate(runs, start=1):
        begun = time.monotonic()
        faults += disturbed(folder / str(number), kinds, expected, rng)
        what = faults[-1].lost or "same params, metrics and result"
        click.echo(f"run {number}: {len(kinds)} faults, {time.monotonic() - begun:.0f} s: {what}")
    table = _table(faults)
    lost = int(table.injected.sum() - table.survived.sum())
    click.echo(table.to_string(index=False))
    click.echo(f"{len(faults)} faults, {lost} lost")
    if json_path is not None:
        numbers = {"injected": len(faults), "lost": lost, "rounds": rounds, "seconds_per_round": expected.per_round}
        content = {**numbers, "kinds": table.to_dict("records")}
        json_path.write_text(json.dumps(content, indent=1) + "\n")
    if lost:
        click.echo(f"the runs are in {folder}", err=True)
        sys.exit(1)
    shutil.rmtree(folder)


def _table(faults: list[Fault]) -> pd.DataFrame:
    """A row per kind: how many, how many survived, and the median of the extra seconds."""
    rows = []
    for kind in COUNTS:
        own = [fault for fault in faults if fault.kind == kind]
        costs = [fault.seconds for fault in own if fault.seconds is not None]
        rows.append(
            {
                "kind": kind,
                "injected": len(own),
                "survived": sum(not fault.lost for fault in own),
                "median_extra_seconds": round(float(np.median(costs)), 2) if costs else None,
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    program(main)
