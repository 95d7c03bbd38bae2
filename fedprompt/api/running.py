"""``fp.run``: one run from Python, with the same folder, parameters and metrics as the command's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt.api.runs import Run, load_run
from fedprompt.config.parsing import from_dict, load
from fedprompt.config.schema import Config
from fedprompt.config.settings import put
from fedprompt.errors import InputError, RunFailed, shown
from fedprompt.failure import told_in_one_line
from fedprompt.runtime.folders.locks import Held
from fedprompt.runtime.run import in_free_folder, new_run, resumed_run, run_in_process

Record = dict[str, Any]
Callback = Callable[[Record], Any]
Entering = AbstractContextManager[tuple[Config, Held]]  # of a run's folder

log = logging.getLogger("fedprompt")


def run(
    config: Mapping[str, Any] | str | os.PathLike[str] | Config | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    local: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Run one experiment and return what it wrote. It is the same as ``fedprompt run``.

    Args:
        config: settings under dotted or nested keys, the path of a YAML file, a complete ``Config``, or None for the
            defaults. With ``resume``, only keys that may change: ``federation.rounds``, ``runtime.*``, ``tracking.*``.
        output: the run's folder; None: a new one below ``runs/``.
        local: run in this process, without Ray. Memory options of our own processes are not set here, so that a step
            on a CPU takes a few percent longer; ``fedprompt.allocation.prepare()`` sets them.
        resume: continue the run in ``output`` from its newest checkpoint.
        overwrite: replace the run in ``output``.
        callbacks: called in turn with the record of each round, a line of metrics.jsonl as a dict. One that returns
            False stops the run: the state is saved, and ``resume`` continues it. On Ray the round that is under way by
            then is finished first.

    Notes about the data and the run go to the logger ``fedprompt``. Ctrl-C saves the state and is raised again.

    Raises InputError, with one line that names the key or file, for bad input and for a folder that holds a run or is
    in use; RunFailed, with one line, where the run fails.
    """
    if resume and output is None:
        raise InputError("resume: needs output, the folder of the run to continue")
    if resume and overwrite:
        raise InputError("resume: does not go with overwrite; allowed: one of them")
    given = os.fspath(config) if isinstance(config, (str, os.PathLike)) else None
    with told_in_one_line(None if output is None else Path(output)):
        if resume and output is not None:
            return _run(Path(output), _resumed(Path(output), config), local, callbacks)
        settings = settings_from(config)

        def go(folder: Path) -> Run:
            return _run(folder, new_run(folder, settings, overwrite, given, log.warning), local, callbacks)

        return in_free_folder(settings, go) if output is None else go(Path(output))


def _run(folder: Path, entering: Entering, local: bool, callbacks: Sequence[Callback]) -> Run:
    """Enter a run's folder, and run in it."""
    with (
        entering as (settings, held),
        told_in_one_line(folder, settings.to_yaml()),
        closing(records(settings, folder, local, log.info, held)) as said,
    ):
        stopped = _follow(said, settings.federation.rounds, callbacks)
    finished = load_run(folder)
    finished.stopped = stopped
    return finished


def _resumed(folder: Path, config: Any) -> Entering:
    """What enters the folder of a run that continues."""
    if config is not None and not isinstance(config, Mapping):
        raise InputError("resume: takes its settings from the folder; allowed as config: a dict of what changes")
    overrides = [f"{key}={json.dumps(value)}" for key, value in _leaves(config or {}, "")]
    return resumed_run(folder, None, overrides, log.warning)


def records(
    config: Config, output: Path, local: bool, stage: Callable[[str], None], held: Held
) -> Iterator[dict[str, Any]]:
    """What a run says while it goes on, in this process or on Ray; ``stage`` is told what it does before the rounds."""
    if local:
        return run_in_process(config, output, stage=stage, held=held)
    stage("starting Ray")
    from fedprompt.runtime.ray.on_ray import run_on_ray

    return run_on_ray(config, output, held)


def raise_failure(record: Mapping[str, Any]) -> None:
    """Raise what a record tells of: InputError or RunFailed for an error, KeyboardInterrupt for a stopped run."""
    if "error" in record:
        raise (InputError if record["code"] == 2 else RunFailed)(record["error"])
    if "stopped" in record:
        raise KeyboardInterrupt


def settings_from(config: Mapping[str, Any] | str | os.PathLike[str] | Config | None) -> Config:
    """A complete configuration of what a user gave. Raises InputError that names the key or the file."""
    if config is None or isinstance(config, Config):
        return from_dict({}) if config is None else from_dict(config.model_dump())
    if isinstance(config, Mapping):
        return from_dict(nested(config))
    if isinstance(config, (str, os.PathLike)):
        return load(Path(config))
    raise InputError(f"config: found {shown(config)}; allowed: a dict, the path of a YAML file, or a Config")


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under dotted or nested keys as nested plain values."""
    tree: dict[str, Any] = {}
    for key, value in _leaves(settings, ""):
        put(tree, key, value)
    return tree


def _leaves(settings: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if not isinstance(name, str) or not all(name.split(".")):
            raise InputError(f"config: found the key {shown(name)}; allowed: names such as 'partition.alpha'")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", _plain(value)


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, paths as texts."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(one) for one in value] if isinstance(value, (list, tuple, np.ndarray)) else value


def _follow(said: Iterator[Record], rounds: int, callbacks: Sequence[Callback]) -> bool:
    """Pass on what a run says; returns whether a callback stopped it before its last round."""
    for record in said:
        raise_failure(record)
        if "stage" in record:
            log.info(record["stage"])
        elif "note" in record:
            log.warning(record["note"])
        elif "round" in record:
            answers = [callback(record) for callback in callbacks]
            if any(answer is False for answer in answers) and record["round"] < rounds:
                return True
    return False
