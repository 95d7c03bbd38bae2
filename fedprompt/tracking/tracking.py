"""All trackers of one run as one: the run's own files first, then those that ``tracking.trackers`` names."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedprompt.config.schema import Config
from fedprompt.errors import InputError, RunFailed
from fedprompt.failure import DETAILS, raised
from fedprompt.registry import Registered
from fedprompt.tracking.drawn import Drawings
from fedprompt.tracking.files import plain
from fedprompt.tracking.metrics import Record
from fedprompt.tracking.registry import TRACKERS
from fedprompt.tracking.run_files import RunFiles
from fedprompt.tracking.tracker import Tracker


class Tracking:
    """Tells every tracker of a run. The folder ``output`` is made if needed.

    What a tracker of another package raises comes out as RunFailed that names it; what ours raise is an ``OSError``
    where something cannot be written.

    Args:
        output: the run's folder.
        config: the run's configuration.
        resume_round: the last round that counts, as saved in the checkpoint; what was written of later rounds goes.
            ``None`` starts afresh and deletes what an earlier run left here.
    """

    def __init__(self, output: Path, config: Config, resume_round: int | None = None) -> None:
        self.output = Path(output)
        self.output.mkdir(parents=True, exist_ok=True)
        files: Registered[type[Tracker]] = Registered("files", "", "", RunFiles)
        drawings = Drawings(self.output)
        self._open: list[tuple[Registered[type[Tracker]], Tracker]] = []
        with ExitStack() as stack:
            stack.callback(self.close)
            for entry in [files, *(TRACKERS.get(name) for name in config.tracking.trackers)]:
                with self._calling(entry, "__init__"):
                    tracker = entry.thing(self.output, config, resume_round)
                    tracker.drawings = drawings
                    self._open.append((entry, tracker))
            stack.pop_all()

    def start(self, class_counts: np.ndarray, class_names: Sequence[str], config_text: str) -> None:
        """Tell of the partition, counts [N, K], and the configuration as text."""
        for entry, tracker in self._open:
            with self._calling(entry, "start"):
                tracker.start(class_counts, class_names, config_text)

    def round(self, record: Record, prompts: Mapping[str, Tensor]) -> None:
        """Tell of a round: its record, with NaN as None, and the prompts."""
        record = plain(record)
        for entry, tracker in self._open:
            with self._calling(entry, "round"):
                tracker.round(record, prompts)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Tell of the result, and close."""
        result = plain(result)
        for entry, tracker in self._open:
            with self._calling(entry, "finish"):
                tracker.finish(result)
        self.close()

    def close(self) -> None:
        """Close all, once; what a run that stops early has written so far stays readable."""
        with ExitStack() as stack:  # all of them, whatever one raises
            while self._open:
                stack.callback(self._close, *self._open.pop(0))

    def _close(self, entry: Registered[type[Tracker]], tracker: Tracker) -> None:
        with self._calling(entry, "close"):
            tracker.close()

    @contextmanager
    def _calling(self, entry: Registered[type[Tracker]], function: str) -> Iterator[None]:
        """Let what a foreign tracker's function raises name it; InputError and RunFailed speak for themselves."""
        try:
            yield
        except (InputError, RunFailed):
            raise
        except Exception as error:
            if entry.is_ours:
                raise
            (self.output / DETAILS).write_text(traceback.format_exc(), encoding="utf-8")
            raise RunFailed(
                f"tracker '{entry.name}' ({entry.place}): {function} raised {raised(error)}; "
                f"all of it in {self.output / DETAILS}"
            ) from error
