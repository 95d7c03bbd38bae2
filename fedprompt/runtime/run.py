"""One run from the command line's point of view: its folder, where it happens, and what becomes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Literal

from fedprompt.config import Config, load
from fedprompt.data import fingerprint
from fedprompt.data import load as load_data
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints import store_of
from fedprompt.runtime.features import FeatureMemory
from fedprompt.runtime.federation import LOADING_DATA, LOADING_MODEL, Federation, Record
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.resuming import FREE_IN_WORDS, changed, start_of
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.tracker import OWN_FILES

OWN = ("config.yaml", "checkpoints", "tensorboard", "pools", "personalize", "error.txt", *OWN_FILES)


def default_output(config: Config) -> Path:
    """A folder of its own for a run that was not given one; a second run of the same second gets a number."""
    first = Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm.name}"
    numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(path for path in chain([first], numbered) if not path.exists())


@contextmanager
def new_run(output: Path, config: Config, overwrite: bool) -> Iterator[None]:
    """Make the folder, write config.yaml, and let the run happen inside.

    A run that lies there, if it may be overwritten, is laid aside until the new one ends: where the new one cannot even
    begin because of its input, the folder is left as it was found. Raises InputError where nothing may be overwritten.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; allowed: a folder")
    present = [name for name in OWN if (output / name).exists()]
    if present and not overwrite:
        raise InputError(
            f"--output: {output} holds a run already ({present[0]}); allowed: --resume, --overwrite, or another folder"
        )
    storage = config.runtime.storage
    if storage and not store_of(storage, output).is_empty():
        raise InputError(f"runtime.storage: {storage} holds the checkpoints of another run; allowed: an empty folder")
    new, aside = not output.exists(), output / ".replaced"
    _remove(aside)
    aside.mkdir(parents=True)
    for name in present:
        (output / name).rename(aside / name)
    try:
        _write_config(output, config)
        yield
    except InputError:
        if not (output / "metrics.jsonl").exists():  # it has not begun
            for name in OWN:
                _remove(output / name)
            for path in aside.iterdir():
                path.rename(output / path.name)
        raise
    finally:
        _remove(aside)
        if new and not any(output.iterdir()):
            output.rmdir()


def saved_settings(output: Path, what: Literal["run", "sweep"], given: str | Path | None) -> Path:
    """The file from which a run or a sweep in ``output`` resumes; InputError without one, or where another is given."""
    saved = output / {"run": "config.yaml", "sweep": "sweep.yaml"}[what]
    if not saved.exists():
        raise InputError(f"--resume: no {what} in {output} ({saved.name} is missing); allowed: the folder of a {what}")
    if given is not None:
        raise InputError(f"--resume: takes its settings from {saved}; leave out {given}, overrides are allowed")
    return saved


def resumed_config(output: Path, path: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of the run in ``output``, with overrides that do not change the rounds it has done.

    Raises InputError where config.yaml or an override is not what the newest checkpoint was made with.
    """
    saved = saved_settings(output, "run", path)
    before, now = load(saved), load(saved, overrides)
    start = start_of(now, output)
    if (start.found is None or start.found.origin is None) and (key := changed(before, now)) is not None:
        raise InputError(f"{key}: cannot change on --resume; allowed: {FREE_IN_WORDS}")
    if now.data.root != before.data.root:
        start.check_data(now, fingerprint(load_data(now.data.name, now.data.root)))
    _write_config(output, now)
    return now


def run_in_process(
    config: Config,
    output: Path,
    memory: FeatureMemory | None = None,
    stage: Callable[[str], None] = lambda what: None,
) -> Iterator[Record]:
    """Run without Ray, in this process.

    ``memory`` holds features that earlier runs have computed here; ``stage`` is told what is done before the rounds.
    """
    start = start_of(config, output)
    stage(LOADING_DATA)
    data, algorithm = build_data(config), build_algorithm(config)
    start.check_data(config, data.fingerprint)
    stage(LOADING_MODEL)
    pool = InProcessPool(config, data, memory)
    try:
        federation = Federation(config, algorithm, data, pool, start, output)
        stage(federation.opening)
        yield from federation.run()
    finally:
        pool.close()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write_config(output: Path, config: Config) -> None:
    write_atomic(output / "config.yaml", config.to_yaml().encode())
