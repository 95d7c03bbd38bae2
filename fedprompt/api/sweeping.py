"""``fp.sweep``: many runs over a grid of settings from Python, as ``fedprompt sweep`` runs them."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.api.running import nested
from fedprompt.api.runs import Run, load_run
from fedprompt.config import yaml_text
from fedprompt.errors import InputError, shown
from fedprompt.failure import told_in_one_line

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("fedprompt")


def sweep(
    file: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> Sweep:
    """Run all trials of a sweep on Ray Tune and return the table of what became of them.

    Args:
        file: the path of a sweep file such as those in ``tune_configs/``, or its content as a dict.
        output: the sweep's folder, with a folder per trial; None: a new one below ``runs/sweeps/``.
        overrides: settings that go into the sweep's ``base``; with ``resume``, keys of runtime and tracking.
        resume: run what is left of the sweep in ``output``.

    A trial that fails is a row of the table with its reason, and no error. Ctrl-C leaves running trials with their
    checkpoints and is raised again. Raises InputError, with one line, for a wrong file or a folder in use; RunFailed
    where Ray Tune itself fails.
    """
    from fedprompt.sweeps import sweep as sweeping

    if resume and (output is None or file is not None):
        raise InputError("resume: needs output, the folder of the sweep to continue, and takes no file")
    given = [f"{key}={json.dumps(value)}" for key, value in _dotted(overrides or {}).items()]
    folder = None if output is None else Path(output)
    with told_in_one_line(folder), tempfile.TemporaryDirectory() as scratch:
        if resume and folder is not None:
            plan = sweeping.resumed(folder, None, given)
        else:
            plan = sweeping.planned(_path(file, Path(scratch)), given, folder)
        with told_in_one_line(plan.output, plan.file.to_yaml()):
            sweeping.run(plan, log.info, log.info)
    return Sweep(plan.output)


class Sweep:
    """A sweep's folder, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"<Sweep in {self.folder}: {len(self.results)} trials>"

    @property
    def results(self) -> pd.DataFrame:
        """The content of results.csv: a row per trial with its status, swept settings and accuracies (0 to 1)."""
        import pandas as pd

        return pd.read_csv(self.folder / "results.csv", float_precision="round_trip")

    @property
    def runs(self) -> dict[str, Run]:
        """The runs of the trials that have begun, by the trials' names."""
        names = [str(name) for name in self.results["trial"]]
        return {name: load_run(self.folder / name) for name in names if (self.folder / name / "config.yaml").exists()}

    def verdict(self) -> str:
        """Every method at every level of heterogeneity, in percent, mean ± deviation over seeds, and the best ones."""
        from fedprompt.reports.verdict import verdict

        return verdict(self.folder)


def _path(file: Any, scratch: Path) -> Path:
    """The sweep file, written down where it is a dict."""
    if isinstance(file, (str, os.PathLike)):
        return Path(file)
    if not isinstance(file, Mapping):
        raise InputError(f"sweep: found {shown(file)}; allowed: the path of a sweep file, or its content as a dict")
    path = scratch / "sweep.yaml"
    path.write_text(yaml_text.dump(_content(file)), encoding="utf-8")
    return path


def _content(file: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep file's content as plain values; ``space`` keeps its dotted keys."""
    base = file.get("base")
    return {**file, "base": nested(base)} if isinstance(base, Mapping) else dict(file)


def _dotted(settings: Mapping[str, Any]) -> dict[str, Any]:
    from fedprompt.tracking.runs import flat

    return flat(nested(settings))
