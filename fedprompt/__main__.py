"""The command ``fedprompt``: from its first line on it can be stopped, and its output lost, without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from fedprompt import allocation, interrupts, outlets


def main() -> None:
    """Run the command that was given, and end the process with its code."""
    interrupts.end_at_once("fedprompt: interrupted")
    outlets.prepare()
    allocation.prepare()
    code = _code(_command)
    interrupts.ignore()
    code = _code(outlets.finish) or code
    if code:
        os._exit(code)  # not before Ray is gone, but without waiting for threads of a round that was given up
    sys.exit(0)


def _command() -> None:
    try:
        from fedprompt.cli import main as command
    except Exception as error:  # an installation that is broken
        from fedprompt.failure import told

        line = told(error, None)
        print(f"fedprompt: {line['error']}", file=sys.stderr)
        sys.exit(line["code"])
    command.main(prog_name="fedprompt")


def _code(what: Callable[[], object]) -> int:
    try:
        what()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    main()
