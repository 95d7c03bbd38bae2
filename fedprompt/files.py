"""Reading files that a user names: regular files only, and none larger than the reader can use."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fedprompt.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, key: str | None = None) -> BinaryIO:
    """Open a regular file for reading bytes; ``key`` is the setting that names it, for the message.

    A named pipe would block for ever, and reading a device may never end, so both are refused unopened. Raises
    InputError with one line that says what is wrong.
    """
    where = f"{key}: {path}" if key else f"{path}"
    try:
        _check_kind(os.stat(path), where)
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 (the caller closes it)
        try:
            _check_kind(os.fstat(file.fileno()), where)
        except InputError:
            file.close()
            raise
    except FileNotFoundError:
        what = "a link to a file that is missing" if os.path.islink(path) else "missing"
        raise InputError(f"{where}: is {what}; allowed: a readable file") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error}); allowed: a readable file") from None
    except ValueError as error:  # a null character in the path
        raise InputError(f"{where!r}: no path of a file ({error}); allowed: a readable file") from None
    return file


def read_regular(path: str | Path, key: str | None = None, *, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes; InputError as ``open_regular``, or if larger."""
    with open_regular(path, key) as file:
        size = os.fstat(file.fileno()).st_size
        where = f"{key}: {path}" if key else f"{path}"
        if size > most:
            raise InputError(f"{where}: has {size:,} bytes; allowed: at most {most:,}")
        try:
            return file.read(most)
        except OSError as error:
            raise InputError(f"{where}: cannot be read ({error.strerror or error}); allowed: a readable file") from None


def _without_waiting(name: str, flags: int) -> int:
    """Open without blocking, as the path may mean a named pipe by now; for regular files this changes nothing."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(found: os.stat_result, where: str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{where}: is {_KINDS.get(kind, 'no regular file')}; allowed: a regular file")
