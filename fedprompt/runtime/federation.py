"""The federation loop: sample, send, train, aggregate, score, write, save. It does not know where any of it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprompt.algorithms.base import TRAFFIC, Algorithm, State
from fedprompt.blackbox.service import EVALUATION
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.errors import InputError, RunFailed, os_error_line
from fedprompt.models.params import Params
from fedprompt.runtime.checked import CheckedMethod, in_round
from fedprompt.runtime.checkpoints.file import Best, Checkpoint
from fedprompt.runtime.checkpoints.resuming import Start, check_state, origin_of
from fedprompt.runtime.folders.replacing import forget
from fedprompt.runtime.pool import Pool
from fedprompt.runtime.results import ASKED, asked_before, best_of, is_better, make_result, numbers_of
from fedprompt.runtime.scoring import evaluate
from fedprompt.runtime.training import Training, mean_loss, warnings_of
from fedprompt.seeding import Stream, generator
from fedprompt.tracking.files import plain
from fedprompt.tracking.metrics import RESTORE, read, rounds_so_far
from fedprompt.tracking.tracking import Tracking

Record = dict[str, Any]
LOADING_DATA, LOADING_MODEL = "loading the data", "loading the model"  # what is done before a federation is there


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class Federation:
    """One experiment. ``run`` continues from the checkpoint in ``start``, or begins where there is none.

    ``check`` is called before anything is written; it raises RunFailed where others write here by now.
    Raises InputError where the checkpoint's state does not fit the model, or metrics.jsonl lacks one of its rounds.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        data: FederatedData,
        pool: Pool,
        start: Start,
        output: Path,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self._config, self._data, self._pool = config, data, pool
        self._algorithm = CheckedMethod(algorithm, config, pool.facts.params, len(data.clients))
        self._training = Training(config, self._algorithm, data, pool)
        self._store, self._output = start.store, output
        self._origin = origin_of(config, data.fingerprint, start.files)
        self._stop = False
        store, found = start.store, start.found
        self._saved_round = -1 if found is None else found.round
        self._notes = [
            f"{name}: {what}; went on from round {self._saved_round}" for name, what in store.damaged.items()
        ]
        if found is None and _rounds_in(output / "metrics.jsonl"):
            raise InputError(f"{output}: has done rounds, but their checkpoints are gone; allowed: --overwrite")
        if self._saved_round < 1:
            self._notes += pool.notes
        self._resumed = self._begun = found is not None
        self._now = self._beginning() if found is None else self._going_on(found)
        self.first_round = self._now.round + 1

    def stop(self) -> None:
        """Ask the loop to save and end after the round under way; may be called from another thread."""
        self._stop = True

    @property
    def opening(self) -> str:
        """What ``run`` does first."""
        if self._begun:
            return f"going on from round {self._now.round}"
        return "first evaluation: preparing the images' features, then scoring the model at its start"

    def run(self) -> Iterator[Record]:
        """Run the rounds that are left; yields notes about the data, each round's record and, last, ``{"result": …}``.

        Whatever ends it in the middle of a round, Ctrl-C, an error or closing the iterator, saves the state before that
        round. Raises Stopped when it was asked to stop, RunFailed where too many clients diverge or the disk is full.
        """
        config = self._config
        with self._writing():
            if self._resumed and (lost := self._store.take_back_best(self._now)):
                self._notes.append(lost)
            tracker = self._tracker()
        try:
            yield from ({"note": line} for line in self._data.notes)
            if not self._begun:
                yield self._first_evaluation(tracker)
                if self._stop:
                    raise Stopped
            for round in range(self.first_round, config.federation.rounds + 1):
                with in_round(round, self._output):
                    after, record = self._round(round)
                with self._writing():
                    tracker.round(record, _prompts(after.state))
                self._now = after  # only now: an interrupted round leaves no trace in the next checkpoint
                self._notes.clear()
                if round % config.runtime.checkpoint_every == 0 or round == config.federation.rounds:
                    self._save()
                yield record
                if self._stop:
                    raise Stopped
            result = self._result()
            with self._writing():
                tracker.finish(result)
                self._store.tidy()
            yield {"result": result}
        except RunFailed:
            with suppress(RunFailed):  # the disk is full
                self._save()
            raise
        except BaseException:
            self._save()
            raise
        finally:
            with suppress(OSError, RunFailed):  # what has ended the run is told; after the last round all are closed
                tracker.close()

    def _beginning(self) -> Checkpoint:
        with in_round(0, self._output):
            state = self._algorithm.init(generator(self._config.seed, Stream.INIT, 0, 1))
        return Checkpoint(0, state, origin=self._origin)

    def _going_on(self, found: Checkpoint) -> Checkpoint:
        """The checkpoint as this run continues it; what the user should know of it becomes a note."""
        check_state(
            found, self._algorithm.unchecked, self._pool.facts.params, self._config, self._store.name(found.round)
        )
        self._pool.resume(asked_before(found.totals))
        path, best, first_line = self._output / "metrics.jsonl", found.best, found.first_line
        records = rounds_so_far(path, found.round)
        if found.origin is None:
            self._notes.append(
                f"{self._store.name(found.round)}: of an earlier version, which kept neither configuration nor "
                "fingerprint: that both are still the same was not checked"
            )
            first_line = records[0]["round"] if records else 0
            numbers = best_of(records)
            state = found.state if numbers and numbers["round"] == found.round else None
            best = None if numbers is None else Best(numbers, state)
        if not records:
            first_line = found.round + 1
            self._notes.append(f"{path}: missing; it tells of the rounds from {first_line} on")
        elif records[0]["round"] != first_line:
            raise InputError(f"{path}: begins with round {records[0]['round']}, expected {first_line}; {RESTORE}")
        return replace(found, origin=self._origin, best=best, first_line=first_line)

    def _tracker(self) -> Tracking:
        tracker = Tracking(self._output, self._config, self._now.round if self._resumed else None)
        tracker.start(self._data.class_counts(), self._data.class_names, self._config.to_yaml())
        return tracker

    def _first_evaluation(self, tracker: Tracking) -> Record:
        seconds: dict[str, float] = {}
        with _timed(seconds, "evaluate"), in_round(0, self._output):
            state, scored = self._evaluate(self._now.state)
        self._now = replace(self._now, state=state, totals=self._asked(self._now.totals))
        pool = self._now.state.params.get("pool")
        sizes = {} if pool is None else {"aggregate": {"pool_size": float(len(pool))}}
        record = {"round": 0, **sizes, **scored, **_queries(self._now.totals), "seconds": seconds}
        with self._writing():
            tracker.round(record, _prompts(self._now.state))
        self._begun = True
        self._save()
        forget(self._output)
        return record

    def _round(self, round: int) -> tuple[Checkpoint, Record]:
        algorithm, seed, before = self._algorithm, self._config.seed, self._now
        seconds: dict[str, float] = {}
        with _timed(seconds, "total"):
            cohort = algorithm.cohort(before.state, round, generator(seed, Stream.COHORT, round))
            with _timed(seconds, "train"):
                updates, told = self._training.train(before.state, round, cohort)
            with _timed(seconds, "aggregate"):
                state, metrics = before.state, {}
                if updates:
                    rng = generator(seed, Stream.AGGREGATE, round)
                    state, metrics = algorithm.aggregate(state, updates, rng)
                    between = {name: int(metrics[name]) for name in TRAFFIC if name in metrics}
                    metrics = {name: value for name, value in metrics.items() if name not in TRAFFIC}
                    told["communication"].update(between)
            if "pool" in state.params:
                metrics = {"pool_size": float(len(state.params["pool"])), **metrics}
            record: Record = {
                "round": round,
                "cohort": cohort,
                **told,
                "train": {"loss": mean_loss(updates)},
                "aggregate": metrics,
                "seconds": seconds,
                "warnings": self._notes + warnings_of(updates, told) + (algorithm.warnings(metrics) if updates else []),
            }
            if self._is_scored(round):
                with _timed(seconds, "evaluate"):
                    state, scored = self._evaluate(state)
                record.update(scored)
        totals = self._asked(_added(before.totals, {**record["communication"], **seconds}))
        record.update(_queries(totals))
        best = before.best
        if "test" in record and is_better(numbers := plain(numbers_of(record)), best and best.numbers):
            best = Best(numbers, state)
        return replace(before, round=round, state=state, totals=totals, best=best), record

    def _is_scored(self, round: int) -> bool:
        return round % self._config.federation.eval_every == 0 or round == self._config.federation.rounds

    def _evaluate(self, state: State) -> tuple[State, Record]:
        scored, served = evaluate(self._pool, self._algorithm, state, self._data, self._config.seed)
        return self._algorithm.after_test(state, served), scored

    def _asked(self, totals: dict[str, float]) -> dict[str, float]:
        """Totals with the queries that a black-box model has answered so far, by client."""
        return {**totals, **{f"{ASKED}{client}": count for client, count in sorted(self._pool.queries().items())}}

    def _save(self) -> None:
        if self._begun and self._saved_round != self._now.round:
            with self._writing():
                self._store.save(self._now)
            self._saved_round = self._now.round
            if self._now.best is not None:  # its models are stored now
                self._now = replace(self._now, best=replace(self._now.best, state=None))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """End the run with one line where something cannot, or must not, be written."""
        try:
            self._check()
            yield
        except OSError as error:
            saved = f"goes on from round {self._saved_round}" if self._saved_round >= 0 else "begins anew"
            raise RunFailed(f"{os_error_line(error)}; when that is mended, --resume {saved}") from error

    def _result(self) -> Record:
        records = read(self._output / "metrics.jsonl")
        result = make_result(self._config, self._data, self._pool.facts, records, self._now.totals)
        return {**result, "best": self._now.best.numbers}


def _queries(totals: Mapping[str, float]) -> Record:
    """The running numbers of queries, as they stand in a line of metrics.jsonl; nothing where no model was asked."""
    asked = asked_before(totals)
    evaluation = asked.pop(EVALUATION, 0)
    return {"queries": {"train": sum(asked.values()), "evaluation": evaluation}} if asked or evaluation else {}


def _rounds_in(path: Path) -> bool:
    return path.exists() and any(record["round"] > 0 for record in read(path))


def _prompts(state: State) -> Params:
    return {name: value for name, value in state.params.items() if name in ("prompt", "deep", "pool")}


def _added(totals: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    return {name: totals.get(name, 0) + more.get(name, 0) for name in {**totals, **more}}


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
