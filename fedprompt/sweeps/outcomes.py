"""results.csv: what has become of every trial of a sweep, one row each, and the same for TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from fedprompt.errors import InputError
from fedprompt.personalization.personalize import FOLDER as PERSONAL
from fedprompt.runtime.results import LAST
from fedprompt.sweeps.space import Trial, swept_keys
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.runs import flat
from fedprompt.tracking.saved import read_personal, read_records, scored

Status = Literal["pending", "running", "done", "failed", "stopped", "interrupted"]
SCORES = ("best_accuracy", "final_accuracy", "last10_accuracy")
SHOWN = (*SCORES, "rounds", "seconds")  # on the terminal
FILE = "results.csv"


class Outcomes:
    """The table of a sweep in ``folder``; ``results.csv`` is written anew, whole, whenever a row changes.

    ``personal``: trials have ended, and have their numbers, only when their clients have been personalized.
    """

    def __init__(self, folder: Path, trials: Sequence[Trial], personal: bool = False) -> None:
        self.folder, self.trials, self._personal = folder, trials, personal
        self._keys = swept_keys(trials)
        self._rows = [self._row(trial, "pending", "") for trial in trials]

    def status(self, trial: Trial) -> Status:
        """What is known of a trial now."""
        return self._rows[trial.number]["status"]

    def has_ended(self, trial: Trial) -> bool:
        """Whether all results of a trial are in its folder."""
        return self._result(trial).exists()

    def of(self, *statuses: Status) -> list[Trial]:
        """The trials that have one of the statuses."""
        return [trial for trial in self.trials if self.status(trial) in statuses]

    def set(self, trial: Trial, status: Status, reason: str = "") -> dict[str, Any]:
        """Note what has become of a trial, with the numbers that its folder holds; returns its row."""
        row = self._rows[trial.number] = self._row(trial, status, reason)
        return row

    def to_tensorboard(self, trial: Trial) -> None:
        """Let TensorBoard's HPARAMS tab know of a trial that has ended."""
        if "tensorboard" in trial.config.tracking.trackers:
            folder = self.folder / trial.name / "tensorboard"
            write_hparams(folder, self._swept(trial), self._rows[trial.number])

    def write(self) -> None:
        """Write results.csv."""
        write_atomic(self.folder / FILE, pd.DataFrame(self._rows).to_csv(index=False).encode())

    def text(self) -> str:
        """The table as a terminal shows it."""
        table = pd.DataFrame(self._rows)
        formats = {name: "{:.1%}".format for name in SHOWN if name.endswith("accuracy")}
        return table[["trial", "status", *SHOWN]].to_string(index=False, na_rep="", formatters=_blank_nan(formats))

    def reason(self, trial: Trial) -> str:
        """Why a trial failed."""
        return self._rows[trial.number]["reason"]

    def _row(self, trial: Trial, status: Status, reason: str) -> dict[str, Any]:
        records, personal = self.folder / trial.name / "metrics.jsonl", self._result(trial)
        try:
            numbers = summary(read_records(records) if records.exists() else [])
            if self._personal:
                numbers |= personal_summary(read_personal(personal) if personal.exists() else {})
        except InputError as error:  # a trial's damaged file must not end the sweep
            numbers, reason = {"rounds": 0, "seconds": 0.0, **dict.fromkeys(SCORES)}, str(error)
        swept = {**self._swept(trial), "seed": trial.config.seed}
        return {"trial": trial.name, "status": status, "reason": reason, **swept, **numbers}

    def _result(self, trial: Trial) -> Path:
        folder = self.folder / trial.name
        return (folder / PERSONAL if self._personal else folder) / "result.json"

    def _swept(self, trial: Trial) -> dict[str, Any]:
        """The values of all swept keys, as the trial's configuration has them; what it does not have is left empty."""
        settings = flat(trial.config.model_dump())
        return {key: settings.get(key) for key in self._keys}


def read_endings(folder: Path) -> dict[str, tuple[str, str]]:
    """Status and reason of every trial in results.csv, by its name; empty where there is no such file."""
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, usecols=["trial", "status", "reason"]).fillna("")
    except ValueError as error:
        raise InputError(f"{path}: not a table of trials ({' '.join(str(error).split())}); delete it") from None
    return {row.trial: (row.status, row.reason) for row in table.itertuples()}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a run from the lines of its metrics.jsonl, finished or not; None where there are none yet."""
    rounds = [record for record in records if record["round"] > 0]
    evaluations = scored(rounds, "test", "validation")
    best = max(evaluations, key=lambda record: record["validation"]["accuracy"], default=None)
    last = evaluations[-1] if evaluations else None
    row: dict[str, Any] = {}
    for split, name in (("test", "accuracy"), ("validation", "validation_accuracy")):
        row[f"best_{name}"] = best and best[split]["accuracy"]
        row[f"final_{name}"] = last and last[split]["accuracy"]
        row[f"last10_{name}"] = _mean([r[split]["accuracy"] for r in evaluations[-LAST:]])
    pools = [size for r in records if (size := r.get("aggregate", {}).get("pool_size")) is not None]
    return {
        **row,
        "client_mean_accuracy": last and last.get("clients", {}).get("mean_accuracy"),
        "pool_size": int(pools[-1]) if pools else None,
        **{way: sum(r.get("communication", {}).get(way, 0) for r in rounds) for way in ("up_bytes", "down_bytes")},
        "seconds": round(sum(r.get("seconds", {}).get("total", 0.0) for r in rounds), 3),
        "rounds": rounds[-1]["round"] if rounds else 0,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def personal_summary(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a personalization from its result.json; None where it is empty, or was not asked for a kind.

    ``start``: the federated state; ``balanced`` and ``interpolated``: the best mean of both accuracies, by clients' own
    models and by those between.
    """
    keys = ("personal_accuracy", "robust_accuracy", "lr", "epoch", "lambda")
    chosen = {"start": keys[:2], "most_personal": keys[:4], "balanced": keys[:4], "interpolated": keys}
    return {f"{kind}_{key}": (result.get(kind) or {}).get(key) for kind, kept in chosen.items() for key in kept}


def write_hparams(folder: Path, swept: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a trial's swept values and its numbers into its own TensorBoard folder, as the HPARAMS tab wants them.

    ``SummaryWriter.add_hparams`` would make a second run below, so the three records of the tab are written here.
    """
    scores = {f"hparams/{name}": row[name] for name in row if name.endswith("accuracy") and row[name] is not None}
    plain = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in swept.items()}
    records: tuple[Summary, ...] = hparams(plain, scores)
    writer = SummaryWriter(str(folder))
    try:
        for record in records:
            writer.file_writer.add_summary(record)
        for tag, value in scores.items():
            writer.add_scalar(tag, value, row["rounds"])
    finally:
        writer.close()


def _blank_nan(formats: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (lambda value, shown=shown: "" if pd.isna(value) else shown(value)) for name, shown in formats.items()
    }
