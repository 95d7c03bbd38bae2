"""A sweep on Ray Tune: many runs on one cluster, each in a folder of its own, and a table of what became of them.

Tune decides which trials run when, by what the cluster has, and asks its scheduler which ones to stop early; the trials
themselves, their folders and the table are ours, so a sweep is resumed from what its folder holds: trials with a result
are left alone, stopped ones too, all others continue from their own checkpoints. A resumed scheduler compares the
trials of its own session only.

On a cluster of several hosts the sweep's folder must be reachable from all of them under the same path, for every
trial's driver writes there, wherever it runs. Checkpoints may be elsewhere (``runtime.storage``: a sub-folder each).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from textwrap import shorten
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from fedprompt.errors import InputError, RunFailed
from fedprompt.personalization.personalize import settings_of
from fedprompt.runtime.checkpoints.resuming import check_made
from fedprompt.runtime.checkpoints.store import store_of
from fedprompt.runtime.folders.holders import is_unused
from fedprompt.runtime.folders.locks import Held, entered
from fedprompt.runtime.ray.on_ray import DRIVER_RESTARTS, connected
from fedprompt.runtime.run import first_free, saved_settings
from fedprompt.sweeps.outcomes import FILE, Outcomes, read_endings
from fedprompt.sweeps.space import Trial, expand
from fedprompt.sweeps.sweep_file import SweepFile, naming, read
from fedprompt.sweeps.trial import ERROR, METRIC, NOTES, TIME, bundles, run_trial
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.progress import Minutely
from fedprompt.wording import counted

COMMAND = "fedprompt sweep"
FREE_ON_RESUME = ("runtime", "tracking")
GRACE_ROUNDS, REDUCTION = 5, 3.0
STOPPED = "by the scheduler"
TUNE = ".tune"  # Tune's own state, below the sweep's folder
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # it would write every curve a second time
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "RAY_AIR_NEW_OUTPUT": "0",  # its banner
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # not every round is scored
}


@dataclass(frozen=True)
class Sweep:
    """A sweep that is ready to start: its file, its trials, and the folder that it writes to.

    ``resumes``: whether the folder is that of an earlier part of the sweep.
    """

    file: SweepFile
    trials: list[Trial]
    output: Path
    resumes: bool = False


def planned(path: Path, overrides: Sequence[str], output: Path | None) -> Sweep:
    """Read and expand a sweep file. Raises InputError where it is wrong, or ``output`` is a file."""
    sweep = _expanded(path, overrides, output or _default_output(path))
    if sweep.output.exists() and not sweep.output.is_dir():
        raise InputError(f"--output: {sweep.output} is a file; allowed: a folder")
    for trial in sweep.trials:
        storage = trial.config.runtime.storage
        if storage and not store_of(storage, sweep.output).is_empty():
            raise InputError(f"runtime.storage: {storage} holds checkpoints already; allowed: an empty folder")
    return sweep


def resumed(output: Path, path: Path | None, overrides: Sequence[str]) -> Sweep:
    """Read the sweep in ``output`` again; only where it runs may change, in its file, too."""
    saved = saved_settings(output, "sweep", path)
    for override in overrides:
        if override.partition(".")[0].strip() not in FREE_ON_RESUME:
            raise InputError(f"{override}: cannot change on --resume; allowed: keys of {' and '.join(FREE_ON_RESUME)}")
    written = (output / FILE).exists() or saved.read_text(encoding="utf-8") == read(saved, []).to_yaml()
    if overrides and not written:
        raise InputError(
            f"--resume: {saved} was not written by a sweep, and overrides would change it; allowed: no overrides"
        )
    sweep = replace(_expanded(saved, overrides, output), resumes=True)
    for trial in sweep.trials:
        check_made(output / trial.name, trial.config, f"on --resume what {saved} said at the start")
    return sweep


def run(sweep: Sweep, say: Callable[[str], None], stage: Callable[[str], None]) -> Outcomes:
    """Run all trials that have not ended yet, and return the table; ``say`` gets a line per trial that ends.

    ``stage`` is told that Ray starts, once the folder is held.

    Ctrl-C leaves running trials with their checkpoints and is raised again. Raises InputError where no cluster can be
    reached, a trial does not fit into it, or the folder is in use or not empty; RunFailed where Tune itself fails.
    """
    with _held(sweep) as held, _connected(sweep, say, stage):
        for trial in sweep.trials:
            bundles(trial)
        outcomes = _so_far(sweep)
        _write_file(sweep)
        outcomes.write()
        left = outcomes.of("pending")
        say(f"{len(left)} of {counted(len(sweep.trials), 'trial')} to run, into {sweep.output}")
        try:
            if left:
                _tune(sweep, left, outcomes, say, held)
        except BaseException:
            for trial in outcomes.of("running"):
                outcomes.set(trial, "interrupted")
            outcomes.write()
            raise
    return outcomes


@contextmanager
def _connected(sweep: Sweep, say: Callable[[str], None], stage: Callable[[str], None]) -> Iterator[None]:
    stage("starting Ray")
    with connected(sweep.trials[0].config, say):
        yield


@contextmanager
def _held(sweep: Sweep) -> Iterator[Held]:
    """Hold the sweep's folder. Raises InputError where it is in use, or of another sweep."""
    with entered(sweep.output, "--output", COMMAND) as lock:
        if not sweep.resumes and not is_unused(sweep.output):
            raise InputError(f"--output: {sweep.output} is not an empty folder; allowed: --resume, or another folder")
        yield Held(lock)


def _write_file(sweep: Sweep) -> None:
    """Write sweep.yaml; one that says the same already stays as it is, with its user's comments."""
    path = sweep.output / "sweep.yaml"
    if not path.exists() or read(path, []).to_yaml() != sweep.file.to_yaml():
        write_atomic(path, sweep.file.to_yaml().encode())


def _expanded(path: Path, overrides: Sequence[str], output: Path) -> Sweep:
    file = read(path, overrides)
    with naming(path):
        trials = expand(file)
        _check_grace(file, trials)
        for trial in trials if file.personalize is not None else ():
            settings_of(file.personalize, trial.config)
    return Sweep(file, trials, output)


def _check_grace(file: SweepFile, trials: Sequence[Trial]) -> None:
    rounds = max(trial.config.federation.rounds for trial in trials)
    if file.scheduler != "none" and _grace(file) > rounds:
        raise InputError(
            f"grace_rounds: {_grace(file)} is more than federation.rounds = {rounds}; allowed: 1 to {rounds}"
        )


def _grace(file: SweepFile) -> int:
    return file.grace_rounds or GRACE_ROUNDS


def _default_output(path: Path) -> Path:
    return first_free(Path("runs") / "sweeps" / f"{datetime.now():%Y%m%d-%H%M%S}-{path.stem}")


def _so_far(sweep: Sweep) -> Outcomes:
    """The table as the folder tells it: a result means done, and who was stopped stays so."""
    personal = sweep.file.personalize is not None
    outcomes, before = Outcomes(sweep.output, sweep.trials, personal), read_endings(sweep.output)
    for trial in sweep.trials:
        status, _ = before.get(trial.name, ("", ""))
        if outcomes.has_ended(trial):
            outcomes.set(trial, "done")
            if status != "done":  # the sweep was killed before it came to know
                outcomes.to_tensorboard(trial)
        elif status == "stopped":
            outcomes.set(trial, "stopped", STOPPED)
    return outcomes


def _tune(sweep: Sweep, left: Sequence[Trial], outcomes: Outcomes, say: Callable[[str], None], held: Held) -> None:
    os.environ.update(QUIET)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are told in the table
    shutil.rmtree(sweep.output / TUNE, ignore_errors=True)
    folder = str(sweep.output.resolve())
    personal = None if sweep.file.personalize is None else settings_of(sweep.file.personalize)
    trainable = tune.with_parameters(
        run_trial, trials=sweep.trials, output=folder, personal=personal, sweep=held.passed_on()
    )
    scheduler = _scheduler(sweep)
    tuner = tune.Tuner(
        tune.with_resources(trainable, lambda chosen: bundles(sweep.trials[chosen["trial"]])),
        param_space={"trial": tune.grid_search([trial.number for trial in left])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=sweep.file.max_concurrent,
            # A process that ended its trial takes the next one; one that was stopped may still be at work.
            reuse_actors=sweep.file.scheduler == "none",
            trial_dirname_creator=lambda trial: sweep.trials[trial.config["trial"]].name,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=folder,
            callbacks=[_Watch(outcomes, say)],
            failure_config=tune.FailureConfig(max_failures=DRIVER_RESTARTS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (tune.TuneError, ray.exceptions.RayError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError):
            raise cause from None
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise RunFailed(f"Ray Tune failed ({reason}); continue with --resume") from error


def _scheduler(sweep: Sweep) -> TrialScheduler:
    """Trials are compared at the rounds in which they are scored, on the validation split."""
    file, compared = sweep.file, {"time_attr": TIME, "metric": METRIC, "mode": "max"}
    if file.scheduler == "asha":
        rounds = max(trial.config.federation.rounds for trial in sweep.trials)
        return AsyncHyperBandScheduler(
            **compared,
            max_t=rounds,
            grace_period=_grace(file),
            reduction_factor=file.reduction or REDUCTION,
            stop_last_trials=False,
        )
    if file.scheduler == "median":
        return MedianStoppingRule(**compared, grace_period=_grace(file))
    return FIFOScheduler()


class _Watch(tune.Callback):
    """Keeps the table up to date while Tune is at work, and says once a minute at least how far it is."""

    def __init__(self, outcomes: Outcomes, say: Callable[[str], None]) -> None:
        self._outcomes, self._say = outcomes, Minutely(say)
        self._rounds: dict[str, int] = {}  # by trials that are running
        self._noted: set[str] = set()

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        if TIME in result:
            self._rounds[self._ours(trial).name] = result[TIME]
        for note in result.get(NOTES, ()):  # of the data, which many trials share: once
            if note not in self._noted:
                self._noted.add(note)
                self._say.now(note)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._say(self._under_way())

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._outcomes.set(self._ours(trial), "running")
        self._outcomes.write()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        ours, error = self._ours(trial), trial.last_result.get(ERROR)
        if error:
            self._ended(ours, "failed", error)
        elif self._outcomes.has_ended(ours):
            self._ended(ours, "done")
        else:
            self._ended(ours, "stopped", STOPPED)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        lines = str(trial.get_error() or "").strip().splitlines()
        self._ended(self._ours(trial), "failed", f"its process died ({lines[-1] if lines else 'no reason given'})")

    def _ended(self, trial: Trial, status: Any, reason: str = "") -> None:
        row = self._outcomes.set(trial, status, reason)
        if status != "failed":
            self._outcomes.to_tensorboard(trial)
        self._outcomes.write()
        ended = len(self._outcomes.of("done", "failed", "stopped"))
        known = [which for which in ("best", "last10") if row[f"{which}_accuracy"] is not None]
        scores = [f"{row[f'{which}_accuracy']:.1%} {which}" for which in known]
        numbers = ", ".join([*scores, counted(row["rounds"], "round"), f"{row['seconds']:.0f} s"])
        told = shorten(reason, 100) if status == "failed" else numbers  # all of it at the end
        self._say.now(f"[{ended}/{len(self._outcomes.trials)}] {trial.name}: {status}, {told}")

    def _under_way(self) -> str:
        running = [
            f"{trial.name} (round {self._rounds.get(trial.name, 0)}/{trial.config.federation.rounds})"
            for trial in self._outcomes.of("running")
        ]
        ended = len(self._outcomes.of("done", "failed", "stopped"))
        return f"[{ended}/{len(self._outcomes.trials)}] running: {', '.join(running) or 'none yet'}"

    def _ours(self, trial: Any) -> Trial:
        return self._outcomes.trials[trial.config["trial"]]
