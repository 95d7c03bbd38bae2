"""One run from the command line's point of view: its folder, where it happens, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Literal, TypeVar

from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.data import fingerprint
from fedprompt.data import load as load_data
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints.resuming import FREE_IN_WORDS, changed, start_of
from fedprompt.runtime.checkpoints.store import store_of
from fedprompt.runtime.features import FeatureMemory
from fedprompt.runtime.federation import LOADING_DATA, LOADING_MODEL, Federation, Record
from fedprompt.runtime.folders.folders import check_replaceable, inputs_of, is_complete, mark, mark_of, marked
from fedprompt.runtime.folders.holders import InUse
from fedprompt.runtime.folders.locks import NOBODY, Held, Lock, PassedOn, entered
from fedprompt.runtime.folders.replacing import WHOLE, forget, lay_aside, put_back, recover, remove_own
from fedprompt.runtime.pool import InProcessPool
from fedprompt.tracking.files import write_atomic

Say = Callable[[str], None]
T = TypeVar("T")

COMMAND = "fedprompt run"
PERSONALIZED = "personalize"


def default_output(config: Config) -> Path:
    """A folder of its own for a run that was not given one; a second run of the same second gets a number."""
    return first_free(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm.name}")


def first_free(first: Path) -> Path:
    """The path itself, or with the first number behind it of which there is nothing."""
    numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
    return next(path for path in chain([first], numbered) if not path.exists())


@contextmanager
def new_run(
    output: Path, config: Config, overwrite: bool, given: str | None = None, say: Say = lambda line: None
) -> Iterator[tuple[Config, Held]]:
    """Make the folder and hold it, write config.yaml, and let the run happen inside.

    A run that lies there, if it may be overwritten, is laid aside until the new one has begun: where the new one ends
    before, the folder is left as it was found. ``given``: the configuration file; ``say`` is told what an earlier crash
    has left. Raises InputError where the folder is in use, or nothing may be overwritten.
    """
    with entered(output, "--output", COMMAND) as folder, ExitStack() as stack:
        for line in recover(output):
            say(line)
        present = check_replaceable(output, inputs_of(config, given), overwrite)
        held = stack.enter_context(_held(config, output, folder))
        if config.runtime.storage and not store_of(config.runtime.storage, output).is_empty():
            storage = config.runtime.storage
            raise InputError(
                f"runtime.storage: {storage} holds the checkpoints of another run; allowed: an empty folder"
            )
        if present:
            _lay_aside(output, present)
        try:
            mark(output, "run")
            _write_config(output, config)
            yield config, held
        except BaseException as error:
            _undo(output, bool(present), error, say)
            raise
        forget(output)


def in_free_folder(config: Config, go: Callable[[Path], T]) -> T:
    """Call ``go`` with a new folder below ``runs/``, with another where a run of this second was quicker to take it."""
    while True:
        free = default_output(config)
        try:
            return go(free)
        except InUse as refused:
            if refused.place != str(free):
                raise


@contextmanager
def resumed_run(
    output: Path, path: str | None, overrides: Sequence[str], say: Say = lambda line: None
) -> Iterator[tuple[Config, Held]]:
    """Hold the folder of a run, and go on with it inside; ``say`` is told what an earlier crash has left.

    Raises InputError where there is no run, where it is in use, or where settings change that may not.
    """
    if not output.is_dir():
        saved_settings(output, "run", path)
    with entered(output, "--output", COMMAND) as folder:
        for line in recover(output):
            say(line)
        config = resumed_config(output, path, overrides)
        with _held(config, output, folder) as held:
            _write_config(output, config)
            yield config, held


@contextmanager
def held_trial(config: Config, output: Path, command: str, sweep: PassedOn) -> Iterator[Held]:
    """Hold the folder of a trial for the ``sweep`` that is at work, and write its config.yaml, before it runs inside.

    Waits for the processes of a sweep that was killed. Raises InUse where another command writes there.
    """
    with (
        entered(output, "trial", command, session=sweep.session, patient=True) as folder,
        _held(config, output, folder, command, sweep) as held,
    ):
        recover(output)
        mark(output, "run")
        _write_config(output, config)
        yield held


@contextmanager
def _held(
    config: Config, output: Path, folder: Lock, command: str = COMMAND, sweep: PassedOn | None = None
) -> Iterator[Held]:
    """Hold a run's checkpoints in addition to its folder: another run may have been told to write into them."""
    storage = config.runtime.storage
    if storage is None:
        key, place = "--output", output / "checkpoints"
    else:
        store_of(storage, output)  # InputError that names the key where it is no place
        key, place = "runtime.storage", storage
        if Path(storage.removeprefix("file://")).resolve() == output.resolve():
            raise InputError(f"runtime.storage: {storage} is the run's own folder; allowed: one inside it, or another")
    session = sweep and sweep.session
    with entered(place, key, command, session=session, patient=session is not None) as written:
        yield Held(folder, written, *(sweep.tickets if sweep else ()))


def _lay_aside(output: Path, files: Sequence[Path]) -> None:
    """Lay a run aside, with its clients' personalization unless one is under way: that is refused as InUse."""
    personalized = output / PERSONALIZED
    if not personalized.is_dir():
        return lay_aside(output, files)
    with entered(personalized, "--output", COMMAND):
        lay_aside(output, files)
    with suppress(OSError):  # not empty: there is something of the user's in it
        personalized.rmdir()


def _undo(output: Path, replaced: bool, error: BaseException, say: Say) -> None:
    """Leave the folder as it was where the new run ends before it has begun.

    A new run in a place of its own that was stopped keeps its configuration, with which it can be resumed.
    """
    if (output / "metrics.jsonl").exists() and not (output / WHOLE).exists():
        return
    if put_back(output):
        if not isinstance(error, InputError):
            say(f"{output}: the new run had not begun; the one that lay there is back")
    elif not replaced and isinstance(error, InputError):
        remove_own(output)
        mark_of(output, "run").unlink()


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
    if marked(output, "run") is None and not is_complete(saved):
        raise InputError(f"--resume: {saved} was not written by a run; allowed: the folder of a run")
    before, now = load(saved), load(saved, overrides)
    start = start_of(now, output)
    if (start.found is None or start.found.origin is None) and (key := changed(before, now)) is not None:
        raise InputError(f"{key}: cannot change on --resume; allowed: {FREE_IN_WORDS}")
    if now.data.root != before.data.root:
        start.check_data(now, fingerprint(load_data(now.data.name, now.data.root)))
    return now


def run_in_process(
    config: Config,
    output: Path,
    memory: FeatureMemory | None = None,
    stage: Callable[[str], None] = lambda what: None,
    held: Held = NOBODY,
) -> Iterator[Record]:
    """Run without Ray, in this process.

    ``memory`` holds features that earlier runs have computed here; ``stage`` is told what is done before the rounds;
    ``held``: the folders that are written to.
    """
    start = start_of(config, output)
    stage(LOADING_DATA)
    data, algorithm = build_data(config), build_algorithm(config)
    start.check_data(config, data.fingerprint)
    stage(LOADING_MODEL)
    pool = InProcessPool(config, data, memory)
    try:
        federation = Federation(config, algorithm, data, pool, start, output, held.check)
        stage(federation.opening)
        yield from federation.run()
    finally:
        pool.close()


def _write_config(output: Path, config: Config) -> None:
    write_atomic(output / "config.yaml", config.to_yaml().encode())
