"""What is told when something fails: one line and an exit code, and a file that holds the rest."""

from __future__ import annotations

import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from fedprompt.errors import LONGEST_LINE, InputError, RunFailed, os_error_line
from fedprompt.texts import printable

DETAILS = "error.txt"
PASSED = (InputError, RunFailed, click.ClickException, click.exceptions.Exit, click.Abort)
UNTOLD = (KeyboardInterrupt, SystemExit, GeneratorExit)  # no failures
SMALLER = "local.batch_size, runtime.group_size, runtime.workers, backbone.image_size, prompt.length, prompt.pool_size"
_NO_MEMORY = re.compile(r"out ?of ?memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours


def told(error: BaseException, folder: Path | None, configuration: str = "") -> dict[str, Any]:
    """One line about what went wrong, and the exit code that belongs to it.

    Traceback and configuration go into ``error.txt`` in ``folder`` where that is there and can be written, else into a
    temporary file.
    """
    cause = _cause(error)
    if isinstance(cause, InputError):
        return {"error": str(cause), "code": 2}
    if isinstance(cause, RunFailed):
        return {"error": str(cause), "code": 1}
    if isinstance(cause, OSError) and not _is_rays(cause) and not _is_lack_of_memory(cause):
        return {"error": os_error_line(cause), "code": 1}
    line = f"{'a worker failed' if _is_rays(error) else 'failed'} ({_kind(cause)}: {_reason(cause)})"
    if _is_lack_of_memory(cause):
        line = f"out of memory ({_kind(cause)}: {_reason(cause)}); less of it need smaller {SMALLER}"
    path = _written(error, folder, configuration)
    return {"error": printable(f"{line}; all of it in {path}" if path else line, LONGEST_LINE), "code": 1}


@contextmanager
def told_in_one_line(folder: Path | None, configuration: str = "") -> Iterator[None]:
    """Let whatever is raised inside come out as InputError or RunFailed with one line, as ``told`` puts it.

    Interrupts, and what click raises, stay what they are.
    """
    try:
        yield
    except (*PASSED, *UNTOLD):
        raise
    except BaseException as error:  # some libraries' panics are no Exceptions
        line = told(error, folder, configuration)
        raise (InputError if line["code"] == 2 else RunFailed)(line["error"]) from error


def raised(error: BaseException) -> str:
    """What was raised, and where, as the middle of a line about another package's code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} ({Path(place.filename).name}, line {place.lineno})"


def _cause(error: BaseException) -> BaseException:
    """What a worker raised, which comes as one RayTaskError around it, or several."""
    while _is_rays(error) and isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error


def _is_rays(error: BaseException) -> bool:
    """Whether it is one of Ray's errors, without importing Ray."""
    return any(base.__name__ == "RayError" for base in type(error).__mro__)


def _is_lack_of_memory(error: BaseException) -> bool:
    """Python's and numpy's MemoryError; torch has a RuntimeError, Ray and the system errors of their own."""
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    return isinstance(error, (RuntimeError, OSError)) and _NO_MEMORY.search(str(error)) is not None


def _kind(error: BaseException) -> str:
    return type(error).__name__.lstrip("_")


def _reason(error: BaseException) -> str:
    """The error's first line; the last one of Ray's, which are a traceback as text."""
    lines = [line.strip() for line in _ESCAPES.sub("", _text(error)).splitlines() if line.strip()]
    return printable(lines[-1 if _is_rays(error) else 0] if lines else "no reason given", 300)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # of an error class that cannot even say what it is
        return f"{type(second).__name__} in its own text"


def _written(error: BaseException, folder: Path | None, configuration: str) -> Path | None:
    """Write the details down; None where that is not possible anywhere."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    content = f"{trace}\nconfiguration:\n{configuration}\n".encode(errors="backslashreplace")
    if folder is not None and folder.is_dir():
        try:
            (folder / DETAILS).write_bytes(content)
            return folder / DETAILS
        except OSError:
            pass  # it may be what failed
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="fedprompt-", suffix=f"-{DETAILS}", delete=False) as file:
            file.write(content)
            return Path(file.name)
    except OSError:
        return None
