"""How a command ends where something goes wrong: one line on standard error, and the exit code that belongs to it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

import click

from fedprompt.errors import InputError, RunFailed
from fedprompt.failure import told_in_one_line

INTERRUPTED = "fedprompt: interrupted"


def fail(line: str, code: int) -> NoReturn:
    """End the process with one line on standard error."""
    click.echo(line, err=True)
    sys.exit(code)


def guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what can go wrong in a command's function into one line and the exit code that belongs to it."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            with told_in_one_line(None, shlex.join(sys.argv)):
                function(*args, **kwargs)
        except (InputError, RunFailed) as error:
            fail(f"fedprompt: {error}", 2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            fail(INTERRUPTED, 1)

    return call


class OneLine:
    """Mixed into click's commands and groups: usage errors in the form of all others."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments, and call what they ask for."""
        kwargs["standalone_mode"] = False
        try:
            return super().main(*args, **kwargs)  # type: ignore[misc]  # click's, which stands behind this class
        except click.ClickException as error:
            fail(f"fedprompt: {error.format_message()}", 2)
        except click.Abort:
            fail(INTERRUPTED, 1)
