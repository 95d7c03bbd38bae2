"""One run from the command line's point of view: its folder, where it happens, and what becomes of it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fedprompt.config import Config, load
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints import CheckpointStore
from fedprompt.runtime.federation import Federation, Record
from fedprompt.runtime.pool import InProcessPool
from fedprompt.tracking.files import write_atomic

OWN = ("config.yaml", "metrics.jsonl", "result.json", "checkpoints", "tensorboard", "pools")
FREE_ON_RESUME = ("runtime", "tracking", "federation.rounds")  # what may change without changing the rounds so far


def default_output(config: Config) -> Path:
    """A folder of its own for a run that was not given one."""
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.algorithm.name}"


def new_run(output: Path, config: Config, overwrite: bool) -> None:
    """Make the folder and write config.yaml. Raises InputError where a run lies there and may not be overwritten."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; allowed: a folder")
    present = [name for name in OWN if (output / name).exists()]
    if present and not overwrite:
        raise InputError(
            f"--output: {output} holds a run already ({present[0]}); allowed: --resume, --overwrite, or another folder"
        )
    for name in present:
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    output.mkdir(parents=True, exist_ok=True)
    _write_config(output, config)


def resumed_config(output: Path, path: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of the run in ``output``, with overrides that do not change the rounds it has done."""
    saved = output / "config.yaml"
    if not saved.exists():
        raise InputError(f"--resume: no run in {output} (config.yaml is missing); allowed: the folder of a run")
    if path is not None:
        raise InputError(f"--resume: takes its configuration from {saved}; leave out {path}, overrides are allowed")
    before, now = load(saved), load(saved, overrides)
    for key in _changes(before, now):
        if not key.startswith(FREE_ON_RESUME):
            raise InputError(f"{key}: cannot change on --resume; allowed: {', '.join(FREE_ON_RESUME)}")
    _write_config(output, now)
    return now


def run_in_process(config: Config, output: Path) -> Iterator[Record]:
    """Run without Ray, in this process."""
    data, algorithm = build_data(config), build_algorithm(config)
    pool = InProcessPool(config, data)
    try:
        store = CheckpointStore(config.runtime.storage or str(output / "checkpoints"))
        yield from Federation(config, algorithm, data, pool, store, output).run()
    finally:
        pool.close()


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that both save a checkpoint."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _write_config(output: Path, config: Config) -> None:
    write_atomic(output / "config.yaml", config.to_yaml().encode())


def _changes(before: Config, now: Config) -> list[str]:
    old, new = before.model_dump(), now.model_dump()
    flat = [
        (f"{section}.{key}", section, key) for section in new if isinstance(new[section], dict) for key in new[section]
    ]
    changed = [name for name, section, key in flat if old[section].get(key) != new[section][key]]
    return changed + (["seed"] if before.seed != now.seed else [])
