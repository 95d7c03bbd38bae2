"""``fp.load_run``: what a run has written, and the models in its checkpoints."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.errors import InputError, shown
from fedprompt.tracking.metrics import read
from fedprompt.tracking.saved import read_result

if TYPE_CHECKING:
    import pandas as pd

    from fedprompt.api.models import Model


def load_run(folder: str | os.PathLike[str]) -> Run:
    """The run in a folder, finished or not. Raises InputError where there is none, or its configuration is damaged."""
    path = Path(folder)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path}: no run in it (config.yaml is missing); allowed: the folder of a run")
    return Run(path, load(path / "config.yaml"))


class Run:
    """A run's folder, read when asked for. Reading never locks it, so it may be under way."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.stopped = False  # by a callback of ``fp.run``

    def __repr__(self) -> str:
        done, rounds = len(self.records), self.config.federation.rounds
        return f"<Run {self.config.algorithm.name} in {self.folder}: {max(done - 1, 0)} of {rounds} rounds>"

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl as dicts, in the order of rounds."""
        path = self.folder / "metrics.jsonl"
        return read(path) if path.exists() else []

    @property
    def metrics(self) -> pd.DataFrame:
        """The lines of metrics.jsonl: a row per round, with columns such as ``test.accuracy``; round 0 is the start.

        Accuracies are shares from 0 to 1, losses nats, times seconds, traffic bytes. What a round did not measure is
        missing. Raises InputError where the file is damaged.
        """
        import pandas as pd

        frame = pd.json_normalize(self.records)
        return frame.set_index("round") if len(frame) else frame

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json; None while the run has not ended. Raises InputError where it is damaged."""
        path = self.folder / "result.json"
        result = read_result(path) if path.exists() else None
        ended = result is not None and result["rounds"] == self.config.federation.rounds  # else it was prolonged since
        return result if ended else None

    @cached_property
    def _store(self) -> Any:
        from fedprompt.runtime.checkpoints.store import store_of

        return store_of(self.config.runtime.storage, self.folder)

    @property
    def rounds(self) -> list[int]:
        """Rounds whose models are kept: the newest two, and the best on validation."""
        best = self._store.best()
        return sorted({*self._store.rounds(), *([best.round] if best is not None else [])})

    def model(self, round: int | str = "best", client: int | None = None) -> Model:
        """The model of a round as a torch module in eval mode, on this machine's device.

        Args:
            round: ``"best"`` on validation, ``"last"``, or the number of a round that is kept (``rounds``).
            client: the personal model of this client; None: the global model.

        Raises InputError where the round is not kept, or there is no such model.
        """
        from fedprompt.api.models import model_of

        return model_of(self.config, self._checkpoint(round), client)

    def export(self, output: str | os.PathLike[str], round: int | str = "best", client: int | None = None) -> Model:
        """Write the model of a round as plain files that load without fedprompt (``fedprompt export``), and return it.

        Raises InputError as ``model`` does, and where a file of the user's is in the way.
        """
        from fedprompt.api.exporting import write

        model = self.model(round, client)
        write(model, self.records, self.result, Path(output))
        return model

    def _checkpoint(self, round: int | str) -> Any:
        kept = self._store.rounds()
        wanted = max(kept, default=None) if round == "last" else round
        if wanted in kept and type(wanted) is int:
            return self._store.of(wanted)
        best = self._store.best()
        if best is not None and (round == "best" or best.round == wanted):
            return best
        if round == "best":
            raise InputError(f"round: {self.folder} holds no best model yet; allowed: a run that has been scored")
        known = ", ".join(map(str, self.rounds))
        raise InputError(f"round: found {shown(round)}; allowed: best, last{known and f', {known}'}")
