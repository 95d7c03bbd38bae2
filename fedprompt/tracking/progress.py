"""The progress bar of a run on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from fedprompt.tracking.metrics import Record


class Progress:
    """A bar with round, accuracy, pool size and time left; nothing at all where standard error is no terminal.

    Args:
        rounds: number of rounds of the whole run.
        start_round: rounds that are already done (0, or the round of the checkpoint).
        enabled: show the bar; ``None`` asks whether standard error is a terminal.
    """

    def __init__(self, rounds: int, start_round: int = 0, enabled: bool | None = None):
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._bar = tqdm(
            total=rounds, initial=start_round, disable=not shown, file=sys.stderr, unit="round", dynamic_ncols=True
        )
        self._shown: dict[str, str] = {}

    def update(self, record: Record) -> None:
        """Move to the record's round; values that this round does not have stay as they were."""
        for split in ("validation", "test"):
            accuracy = record.get(split, {}).get("accuracy")
            if accuracy is not None:
                self._shown[split] = f"{accuracy:.1%}"
        pool_size = record.get("aggregate", {}).get("pool_size")
        if pool_size is not None:
            self._shown["pool"] = f"{pool_size:.0f}"
        if not self._bar.disable:
            self._bar.set_postfix(self._shown, refresh=False)
            # A run that restarts from a checkpoint reports rounds again: the bar then moves back.
            self._bar.update(record["round"] - self._bar.n)
            self._bar.refresh()

    def note(self, text: str) -> None:
        """Print a line on standard error, above the bar where there is one."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
