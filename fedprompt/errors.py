"""What goes wrong because of what the user gave, and what a black-box model refuses, told apart from our own faults."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from fedprompt.texts import printable

LONGEST_LINE, LONGEST_VALUE = 2000, 120  # characters


class _OneLine(Exception):
    """An error whose text is one line, whatever texts of the user's are in it: the rest is escaped or cut."""

    def __init__(self, line: str) -> None:
        super().__init__(printable(line, LONGEST_LINE))


class InputError(_OneLine):
    """Bad input: one clear line that names the key or file, what was found and what is allowed.

    The command line prints the line without a traceback and exits with code 2.
    """


class RunFailed(_OneLine):
    """A run cannot continue although its input is well formed: one line that says why; exit code 1."""


class OutOfBudget(_OneLine):
    """A black-box model refuses a request: the client has used up its queries. One line that says so."""


def os_error_line(error: OSError) -> str:
    """Say in one line what the system refused: a full disk, a folder that may not be written."""
    return f"{error.filename or 'input/output'}: {error.strerror or error}"


def shown(value: Any) -> str:
    """Return a value as a message shows it: as Python writes it, cut with … where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, or a very deep list
        text = f"a very large {type(value).__name__}"
    return printable(text, LONGEST_VALUE)


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest allowed word, or an empty string."""
    nearest = difflib.get_close_matches(word[:LONGEST_VALUE], list(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
