"""What every fuzzer asks: whatever comes in, the program ends with a result or with one readable line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedprompt.errors import InputError, RunFailed

Result = TypeVar("Result")
LONGEST = 2000  # characters of a line that a person still reads


def judged(call: Callable[[], Result]) -> Result | None:
    """What ``call`` returns, or None where it refuses with one line; any other exception passes through and fails."""
    try:
        return call()
    except (InputError, RunFailed) as error:
        line = str(error)
        assert line.isprintable(), repr(line)
        assert 0 < len(line) <= LONGEST, len(line)
        return None
