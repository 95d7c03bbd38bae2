"""How far a run is: a bar on a terminal, and lines, at least one a minute, wherever its output goes instead."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from fedprompt.tracking.metrics import Record
from fedprompt.wording import duration

MINUTE = 60.0  # seconds between lines
NUMBER = re.compile(r"\d+")


class Minutely:
    """Passes a line on where none was for a minute; ``clock`` gives seconds."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._last = clock()

    def due(self) -> bool:
        """Whether the last line is a minute old."""
        return self._clock() - self._last >= MINUTE

    def now(self, line: str) -> None:
        """Pass a line on in any case."""
        self._last = self._clock()
        self._say(line)

    def __call__(self, line: str) -> None:
        """Pass a line on, or forget it."""
        if self.due():
            self.now(line)


class Lines:
    """What a run says where nobody sees a bar: a line per stage, then one per round or minute, whichever is rarer.

    A round or stage that lasts longer than a minute is told of once a minute.
    """

    def __init__(self, rounds: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._rounds, self._clock = rounds, clock
        self._minutely = Minutely(say, clock)
        self._lock = threading.Lock()
        self._doing, self._since = "starting", clock()
        self._first: tuple[int, float] | None = None  # round and time of the first record
        self._unsaid: str | None = None

    def stage(self, what: str) -> None:
        """Tell what is being done before the first round."""
        with self._lock:
            self._doing, self._since, self._unsaid = what, self._clock(), None
            self._minutely.now(what)

    def update(self, record: Record, shown: dict[str, str]) -> None:
        """Take note of a round that is done."""
        with self._lock:
            now, number = self._clock(), record["round"]
            self._first = self._first or (number, now)
            told = [f"{name} {value}" for name, value in shown.items()]
            left = self._time_left(number, now)
            self._unsaid = ", ".join([f"round {number}/{self._rounds}", *told, *left])
            self._doing, self._since = f"round {number + 1}/{self._rounds}", now
            self._tick()

    def tick(self) -> None:
        """To be called now and then: says that it is still at work where a minute has passed without a line."""
        with self._lock:
            self._tick()

    def _tick(self) -> None:
        if self._minutely.due():
            self._minutely.now(self._unsaid or f"{self._doing}: under way for {duration(self._clock() - self._since)}")
            self._unsaid = None

    def _time_left(self, number: int, now: float) -> list[str]:
        began, since = self._first or (number, now)
        if number == began or number >= self._rounds:
            return []
        return [f"about {duration((now - since) / (number - began) * (self._rounds - number))} left"]


class Progress:
    """A bar on standard error where that is a terminal; lines on standard output where not both of them are one.

    Args:
        rounds: number of rounds of the whole run.
        enabled: show the bar; ``None`` asks whether standard error is a terminal.
    """

    def __init__(self, rounds: int, enabled: bool | None = None):
        shown = sys.stderr.isatty() if enabled is None else enabled
        self._bar = tqdm(total=rounds, disable=not shown, file=sys.stderr, unit="round", dynamic_ncols=True)
        self._lines = None if shown and sys.stdout.isatty() else Lines(rounds, _print)
        self._begun = False
        self._shown: dict[str, str] = {}
        self._warned: set[str] = set()  # in the last round, without numbers
        self._closed = threading.Event()
        if self._lines is not None:
            threading.Thread(target=self._watch, args=(self._lines,), daemon=True).start()

    def stage(self, what: str) -> None:
        """Say what is being done before the first round."""
        if not self._bar.disable:
            self._bar.set_description(what)
        if self._lines is not None:
            self._lines.stage(what)

    def update(self, record: Record) -> None:
        """Move to the record's round; values that this round does not have stay as they were.

        A warning is printed in the first round that has it, not again while it lasts, even if its numbers change.
        """
        self._warn(record["round"], record.get("warnings", ()))
        for split in ("validation", "test"):
            accuracy = record.get(split, {}).get("accuracy")
            if accuracy is not None:
                self._shown[split] = f"{accuracy:.1%}"
        pool_size = record.get("aggregate", {}).get("pool_size")
        if pool_size is not None:
            self._shown["pool"] = f"{pool_size:.0f}"
        if self._lines is not None:
            self._lines.update(record, self._shown)
        if not self._bar.disable:
            self._move(record["round"])

    def note(self, text: str) -> None:
        """Print a line on standard error, above the bar where there is one."""
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._closed.set()
        self._bar.close()

    def _warn(self, round: int, warnings: Sequence[str]) -> None:
        before, self._warned = self._warned, {NUMBER.sub("", warning) for warning in warnings}
        for warning in warnings:
            if NUMBER.sub("", warning) not in before:
                self.note(f"fedprompt: round {round}: {warning}")

    def _move(self, round: int) -> None:
        if not self._begun:  # what was before says nothing about the time that a round takes
            self._begun, self._bar.initial = True, round
            self._bar.set_description(None, refresh=False)
            self._bar.unpause()
        self._bar.set_postfix(self._shown, refresh=False)
        # A run that restarts from a checkpoint reports rounds again: the bar then moves back.
        self._bar.update(round - self._bar.n)
        self._bar.refresh()

    def _watch(self, lines: Lines) -> None:
        while not self._closed.wait(1):
            lines.tick()


def _print(line: str) -> None:
    print(f"fedprompt: {line}", flush=True)
