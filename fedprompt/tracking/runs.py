"""Finished runs below some folders, and which of them are seeds of the same experiment.

What varies between experiments names them: data, partition, federation and backbone make a *setting*, everything about
the algorithm and what it trains makes a *method*.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprompt.config import yaml_text
from fedprompt.errors import InputError
from fedprompt.tracking.saved import read_records, read_result, scored

OWN_FOLDERS = ("checkpoints", "tensorboard", "pools")  # of a run: there are no runs in them


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has ended: its folder, settings under dotted keys, ``result.json`` and lines of ``metrics.jsonl``."""

    folder: Path
    settings: dict[str, Any]
    result: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def seed(self) -> int:
        """The run's seed, of which its partition is drawn, too."""
        return self.settings["seed"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records with scores, without that of the start."""
        return scored(self.records, "test")


@dataclass(frozen=True)
class LeftOut:
    """A run that does not count, and why."""

    folder: Path
    why: str


def find(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """Read all runs below ``folders``: those that have ended, and those that have not or cannot be read.

    Raises:
        InputError: one of the folders is none, or holds no run at all.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: not a folder; allowed: folders of runs, or folders with such folders below")
        below = list(_run_folders(folder))
        if not below:
            raise InputError(f"{folder}: no run in it or below; a run's folder holds config.yaml and result.json")
        for path in below:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            found = _read(path)
            if isinstance(found, Run):
                runs.append(found)
            else:
                left_out.append(found)
    return runs, left_out


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return keys


def _run_folders(folder: Path) -> Iterator[Path]:
    """Folders with a complete configuration, sorted; what a run has laid aside lies in hidden ones."""
    for path, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in OWN_FOLDERS)
        if "config.yaml" in files and _config(Path(path)) is not None:
            yield Path(path)


def _config(folder: Path) -> dict[str, Any] | None:
    """The settings in ``config.yaml``, or None where it is not that of a run."""
    try:
        tree = yaml_text.read(folder / "config.yaml", "configuration file")
    except InputError:
        return {} if (folder / "result.json").exists() else None
    return flat(tree) if isinstance(tree, dict) and {"seed", "algorithm", "federation"} <= tree.keys() else None


def _read(folder: Path) -> Run | LeftOut:
    settings = _config(folder)
    if not settings:
        return LeftOut(folder, "config.yaml cannot be read")
    if not (folder / "result.json").exists():
        return LeftOut(folder, _how_far(folder, settings))
    try:
        result, records = read_result(folder / "result.json"), read_records(folder / "metrics.jsonl")
    except InputError as error:
        return LeftOut(folder, str(error).removeprefix(f"{folder}/"))
    if not scored(records, "test"):
        return LeftOut(folder, "metrics.jsonl: no round has a test accuracy")
    if (last := records[-1]["round"]) != result["rounds"]:
        return LeftOut(folder, f"metrics.jsonl: ends with round {last}, and result.json is of {result['rounds']}")
    return Run(folder, settings, result, records)


def _how_far(folder: Path, settings: dict[str, Any]) -> str:
    """Say how far a run has come that has no result, and its error where it left one."""
    try:
        last = read_records(folder / "metrics.jsonl")[-1]["round"]
    except (InputError, IndexError):
        last = 0
    story = f"no result.json: stopped, failed or under way, round {last} of {settings.get('federation.rounds')}"
    error = folder / "error.txt"
    lines = error.read_text(encoding="utf-8", errors="replace").split("\n") if error.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{story}; {said[-1]}" if said else story
