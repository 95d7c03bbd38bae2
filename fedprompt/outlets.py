"""Standard output and error of a command: any encoding, closed, a pipe whose reader has left, a full disk.

A run is worth more than what it says of itself, so ``keep_going`` lets it go on in silence; a list that nobody reads
ends. Python's own streams would print tracebacks instead.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO, cast

BROKEN_PIPE = 141  # 128 + SIGPIPE, what a shell reports of any program whose reader has left


class Outlet(io.FileIO):
    """A standard stream's descriptor.

    When it cannot be written, a ``silent`` one drops everything from then on; another one ends the command.
    """

    def __init__(self, number: int, silent: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._number, self.silent = number, silent

    def write(self, data: Any, /) -> int:
        """Write, or raise SystemExit with the exit code that belongs to the failure."""
        try:
            return super().write(data)
        except OSError as error:
            _discard(self._number)  # what is buffered then goes away without another error
            left = error.errno == errno.EPIPE
            if self._number == 1 and not left:
                print(f"fedprompt: standard output: {error.strerror}", file=sys.stderr, flush=True)
            if self.silent:
                return len(data)
            raise SystemExit(BROKEN_PIPE if left else 1) from None


def prepare() -> None:
    """Put streams that may be closed, full or of any encoding in the place of Python's."""
    for number in (0, 1, 2):  # a closed one would become the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            _discard(number)
    sys.stderr = _stream(2, sys.stderr, silent=True)
    sys.stdout = _stream(1, sys.stdout, silent=False)


def keep_going() -> None:
    """From here on drop what cannot be written to standard output either: what runs is worth more than its lines."""
    outlet = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if isinstance(outlet, Outlet):
        outlet.silent = True


def finish() -> None:
    """Write what is still buffered; raises SystemExit where that fails."""
    sys.stdout.flush()
    sys.stderr.flush()


def _discard(number: int) -> None:
    """Connect a descriptor to nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _stream(number: int, before: TextIO | None, silent: bool) -> io.TextIOWrapper:
    encoding = "utf-8" if before is None else before.encoding
    at_once = number == 2 or os.isatty(number)
    outlet = io.BufferedWriter(cast(io.RawIOBase, Outlet(number, silent)))
    return io.TextIOWrapper(outlet, encoding, errors="replace", line_buffering=at_once)
