"""Do prompts beat no prompts, and which do? Their start, block, number and rate, and the size of images.

One thing after the other is searched on the validation split, on a seed that is used for nothing else: first the head's
rate without prompts, then the prompts' start, block, number and the size of images, each on top of the best so far and
each with several rates. Number and size are searched before the default block: a step before block 0 takes seven times
as long. What was found there, the default prompts, and no prompts are then compared on other seeds. All this is with
the mean of everybody's newest heads (``fedmem``), under which runs differ less by chance than under that of a cohort's.

Runs lie below runs/prompts and are not repeated once they are done. The CSV has a row per run and is written anew
whenever one ends; the tables and the figure are made of it. With --json FILE, which gets what was found, they are
written next to it. One process per core, one thread each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from studies.comparison.contestants import SEEDS, Overrides, grid
from studies.comparison.program import SHARED, TINY
from studies.comparison.tables import show
from studies.many_runs import SEARCH, Job, chosen, run_stages
from studies.prompts.tables import figure, tables

SIZES = (42, 56, 84)
VARIED = {"init": ("uniform", "patches", "class"), "block": (0, 4, 8, 10, 11), "length": (1, 5, 20, 50), "size": SIZES}
HEAD_RATES = grid(local__lr=(5e-4, 1e-3, 2e-3, 4e-3))
RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of prompts, whatever their start; later the best so far and its neighbours
SEARCHED: Overrides = ("seed=100", "federation.rounds=12")
METHOD: Overrides = ("algorithm.name=fedmem", "algorithm.remembers=head")


@dataclass(frozen=True)
class Prompts:
    """What is searched, at the defaults; of no prompts the length is 0."""

    init: str = "uniform"
    block: int = 10
    length: int = 10
    size: int = 42

    @property
    def overrides(self) -> Overrides:
        """As the configuration says it."""
        size = f"backbone.image_size={self.size}"
        if self.length == 0:
            return size, "prompt.kind=none"
        own = (f"prompt.init={self.init}", f"prompt.layer={self.block}", f"prompt.length={self.length}")
        return size, "prompt.kind=prompt", *own

    @property
    def name(self) -> str:
        """In tables, and as part of the name of a run's folder."""
        own = "none" if self.length == 0 else f"{self.length} {self.init}, block {self.block}"
        return f"{own}, {self.size} px"


def main(json_path: Path | None, quick: bool = False) -> None:
    """Run what is left, print the tables, draw the figure; ``quick`` shows on a tiny backbone that it works."""
    root = Path("runs") / ("prompts-quick" if quick else "prompts")
    csv = root / "prompts.csv" if json_path is None else json_path.with_suffix(".csv")
    varied = [partial(_vary, root, quick, name) for name in VARIED]
    done = run_stages(csv, table, partial(_without, root, quick), *varied, partial(_compare, root, quick))
    runs = pd.read_csv(csv, float_precision="round_trip")
    show(tables(runs), figure(runs), csv)
    if json_path is not None:
        prompts, rates = best(done, quick)
        found = {"prompts": asdict(prompts), "rates": list(rates), "shared": list(SHARED)}
        json_path.write_text(json.dumps(found, indent=1) + "\n")


def best(done: Sequence[Job], quick: bool = False) -> tuple[Prompts, Overrides]:
    """The prompts before the default block, and rates, that did best on validation so far; at first the defaults."""
    start = _start(quick)
    trials = [job for job in done if job.searches and not job.failed]
    trials = [job for job in trials if _prompts(job).length > 0 and _prompts(job).block == start.block]
    if not trials:
        return start, (f"local.prompt_lr={RATES[0]:g}",)
    first = max(sorted(trials, key=lambda job: (job.method, job.rates)), key=lambda job: job.validation)
    return _prompts(first), first.rates


def _start(quick: bool) -> Prompts:
    return Prompts(block=2, size=32) if quick else Prompts()


def _without(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    sizes, rates = ((32,), HEAD_RATES[:2]) if quick else (SIZES, HEAD_RATES)
    return [_trial(root, Prompts(length=0, size=size), rate, quick) for size in sizes for rate in rates]


def _vary(root: Path, quick: bool, name: str, done: Sequence[Job]) -> list[Job]:
    """Trials with all values of one thing; those that were run under another thing's name are among the done ones."""
    found, rates = best(done, quick)
    near = float(rates[-1].partition("=")[2])
    steps = RATES if name == "init" else (near / 3, near, near * 3)
    values = ((1, 2) if name == "block" else (32,) if name == "size" else VARIED[name][:2]) if quick else VARIED[name]
    tried = {(job.method, job.rates) for job in done}
    trials = [
        _trial(root, prompts, (*_head_rate(done, prompts.size), f"local.prompt_lr={step:.3g}"), quick)
        for prompts in (replace(found, **{name: value}) for value in values)
        if (prompts.init, prompts.block) != ("class", 0)  # where all class tokens are alike
        for step in steps[: 1 if quick else None]
    ]
    return [job for job in trials if (job.method, job.rates) not in tried]


def _trial(root: Path, prompts: Prompts, rates: Overrides, quick: bool) -> Job:
    rest = (*SHARED, *METHOD, *prompts.overrides, *SEARCHED, *(_tiny(quick)))
    return Job(root, SEARCH, "fedmem", prompts.name, 100, rates, rest)


def _compare(root: Path, quick: bool, done: Sequence[Job]) -> list[Job]:
    """What was found, the default, and none at their sizes, on the seeds of the comparison of methods."""
    start = _start(quick)
    with_prompts = [best(done, quick)[0], start]
    contestants = dict.fromkeys([*with_prompts, *(Prompts(length=0, size=of.size) for of in with_prompts)])
    searched = chosen(done)
    return [
        Job(
            *(root, "compared", "fedmem", prompts.name, seed, searched[prompts.name]),
            rest=(*SHARED, *METHOD, *prompts.overrides, f"seed={seed}", *_tiny(quick)),
        )
        for seed in SEEDS[: 1 if quick else None]
        for prompts in contestants
    ]


def _head_rate(done: Sequence[Job], size: int) -> Overrides:
    return chosen(done)[Prompts(length=0, size=size).name]


def _tiny(quick: bool) -> Overrides:
    return tuple(key for key in TINY if "prompt.layer" not in key) if quick else ()


def _prompts(job: Job) -> Prompts:
    keys = dict(key.split("=") for key in job.overrides)
    if keys["prompt.kind"] == "none":
        return Prompts(length=0, size=int(keys["backbone.image_size"]))
    return Prompts(
        keys["prompt.init"],
        int(keys["prompt.layer"]),
        int(keys["prompt.length"]),
        int(keys["backbone.image_size"]),
    )


def table(jobs: Sequence[Job]) -> pd.DataFrame:
    """A row per run that did not fail: what it is, and accuracies from 0 to 1; seconds per round."""
    rows = [
        {
            **{name: getattr(job, name) for name in ("stage", "setting", "method", "seed")},
            **asdict(_prompts(job)),
            "rates": " ".join(job.rates),
            "validation": job.validation,
            **{name: job.result[name]["accuracy"] for name in ("best", "final", "last10")},
            "seconds_per_round": job.result["seconds"]["total"] / job.result["rounds"],
        }
        for job in jobs
        if not job.failed
    ]
    return pd.DataFrame(rows).sort_values(["stage", "setting", "method", "seed", "rates"], kind="stable")
