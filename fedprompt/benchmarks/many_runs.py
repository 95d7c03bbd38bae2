"""Many runs side by side, one process per core and one thread each: what the comparisons of methods share.

A comparison is a list of jobs. Those of the stage ``search`` try a method's rates on a seed that is used for nothing
else; ``chosen`` says which did best on the validation split, and the other stages run with them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click
import pandas as pd

from fedprompt import allocation
from fedprompt.benchmarks.contestants import Overrides
from fedprompt.tracking.files import write_atomic

SEARCH = "search"
FAILED = "failed.txt"  # in the folder of a run that diverged
AnyJob = TypeVar("AnyJob")


@dataclass(frozen=True)
class Job:
    """One run of a comparison: where it lies, what it is, and all that differs from the defaults."""

    root: Path
    stage: str  # search, or what the comparison calls its runs
    setting: str
    method: str
    seed: int
    rates: Overrides
    rest: Overrides  # all else, the seed included; where both name a key, the rates' value counts

    @property
    def folder(self) -> Path:
        """Of the run alone, at these rates."""
        words = (self.stage, self.setting, self.method, f"seed{self.seed}", *self.rates)
        return self.root / "-".join(word.replace(", ", "-").replace(" ", "") for word in words)

    @property
    def searches(self) -> bool:
        """Whether it is a trial of rates."""
        return self.stage == SEARCH

    @property
    def overrides(self) -> Overrides:
        """Everything that differs from the defaults."""
        return (*self.rest, *self.rates)

    @property
    def failed(self) -> bool:
        """Whether the run diverged."""
        return (self.folder / FAILED).exists()

    @property
    def ended(self) -> bool:
        """Whether the run need not be repeated."""
        return self.failed or (self.folder / "result.json").exists()

    @property
    def result(self) -> dict[str, Any]:
        """The run's ``result.json``."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def validation(self) -> float:
        """Mean accuracy of the last evaluations on validation data, 0 to 1."""
        return self.result["last10"]["validation_accuracy"]


@dataclass(frozen=True)
class Kept:
    """A run that a table of earlier runs has a row of, from another machine maybe: it counts as done."""

    row: Mapping[str, Any]

    @property
    def failed(self) -> bool:
        """As of a job."""
        return bool(pd.isna(self.row["validation"]))

    @property
    def setting(self) -> str:
        """As of a job."""
        return self.row["setting"]

    @property
    def method(self) -> str:
        """As of a job."""
        return self.row["method"]

    @property
    def rates(self) -> Overrides:
        """As of a job."""
        return tuple(self.row["rates"].split())

    @property
    def searches(self) -> bool:
        """Whether it was a trial of rates."""
        return self.row["stage"] == SEARCH

    @property
    def validation(self) -> float:
        """As of a job."""
        return self.row["validation"]

    def is_of(self, job: Job) -> bool:
        """Whether ``job`` is this run, at the same rates."""
        told = (job.stage, job.setting, job.method, job.seed, job.rates)
        return told == (*(self.row[name] for name in ("stage", "setting", "method", "seed")), self.rates)


def rows_of(csv: Path) -> list[Kept]:
    """The runs that a table has, none where it is missing; no rates are an empty text."""
    return (
        [Kept(row) for row in pd.read_csv(csv, float_precision="round_trip").fillna({"rates": ""}).to_dict("records")]
        if csv.exists()
        else []
    )


def one_per_core() -> ProcessPoolExecutor:
    """Processes that compute on one thread each; they start when there is something to run."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of these processes
    return ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), allocation.prepare)


def run_all(
    processes: Executor, jobs: Sequence[AnyJob], ended: Callable[[AnyJob], bool], run: Callable[[AnyJob], None]
) -> Iterator[AnyJob]:
    """Run what has not ended yet; yields jobs as they end, those that had ended before first.

    ``run`` is a module's function, called in a process that imports that module anew; what it raises is raised here.
    """
    todo = [job for job in jobs if not ended(job)]
    yield from (job for job in jobs if job not in todo)
    futures = {processes.submit(run, job): job for job in todo}
    for future in as_completed(futures):
        future.result()
        yield futures[future]


def run_stages(
    csv: Path,
    table: Callable[[Sequence[Any]], pd.DataFrame],
    *stages: Callable[[Sequence[Any]], Sequence[Job]],
    kept: Sequence[Kept] = (),
) -> list[Any]:
    """Run one stage after the other, each made of the runs that have ended before it; ``kept`` ones have already.

    Whenever a run ends a line says how, and the table of all that have ended is written to ``csv``. A run that diverges
    leaves a note and is not repeated.
    """
    done: list[Any] = list(kept)
    with one_per_core() as processes:
        for stage in stages:
            jobs = [job for job in stage(done) if job.ended or not any(run.is_of(job) for run in kept)]
            for job in jobs:
                _check_made(job)
            for job in run_all(processes, jobs, lambda job: job.ended, _run):
                done.append(job)
                write_atomic(csv, table(done).to_csv(index=False, float_format="%.6g").encode())
                click.echo(told(job))
    return done


def sorted_by_names(table: pd.DataFrame, columns: Sequence[str], names: Iterable[str]) -> pd.DataFrame:
    """Rows in the order of their columns, where names count by their place in ``names``."""
    places = {name: place for place, name in enumerate(names)}
    return table.sort_values(list(columns), key=lambda of: of.map(lambda value: places.get(value, value)))


def _check_made(job: Job) -> None:
    """Raise InputError where a run that has ended was another one: its folder does not tell all of its settings."""
    if job.ended:
        from fedprompt.config.parsing import load
        from fedprompt.runtime.checkpoints.resuming import check_made

        check_made(job.folder, load(None, list(job.overrides)), "another --output, or delete that run's folder")


def _run(job: Job) -> None:
    from fedprompt.errors import RunFailed

    try:
        run_in_folder(job.folder, job.overrides)
    except RunFailed as error:
        (job.folder / FAILED).write_text(f"{error}\n")


def run_in_folder(folder: Path, overrides: Overrides) -> None:
    """One run in this process, over what an unfinished one left; RunFailed where it diverges.

    Features are kept from one run to the next.
    """
    from fedprompt.config.parsing import load
    from fedprompt.runtime.run import new_run, run_in_process

    config = load(None, list(overrides))
    with new_run(folder, config, overwrite=True):
        for _ in run_in_process(config, folder, memory()):
            pass


@cache
def memory() -> Any:
    """Features that were computed in this process."""
    from fedprompt.runtime.features import FeatureMemory

    return FeatureMemory(megabytes=3000)


def chosen(done: Iterable[Job | Kept]) -> dict[str, Overrides]:
    """Every method's best trial of those that were searched, by the mean of the last evaluations on validation data.

    Equally good ones are told apart by their rates, not by which ended first.
    """
    best: dict[str, tuple[float, Overrides]] = {}
    for job in sorted((job for job in done if job.searches and not job.failed), key=lambda job: job.rates):
        if job.method not in best or job.validation > best[job.method][0]:
            best[job.method] = (job.validation, job.rates)
    return {method: rates for method, (_, rates) in best.items()}


def told(job: Job) -> str:
    """A line on how the run ended."""
    which = f"{job.stage} {job.setting} {job.method} seed {job.seed}"
    if job.failed:
        return f"{which}: failed: {(job.folder / FAILED).read_text().strip()} ({' '.join(job.rates)})"
    scores = job.result["last10"]
    return (
        f"{which}: validation {scores['validation_accuracy']:.4f}, test {scores['accuracy']:.4f} "
        f"({' '.join(job.rates)})"
    )


def spread(values: pd.Series | Sequence[float], digits: str = ".1f") -> str:
    """Mean ± standard deviation of a sample; the mean alone of a single value."""
    values = pd.Series(values, dtype=float)
    mean = f"{values.mean():{digits}}"
    return f"{mean} ± {values.std():{digits}}" if len(values) > 1 else mean
