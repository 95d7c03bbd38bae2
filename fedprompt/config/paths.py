"""Settings that are paths: relative to the folder in which the command is given, absolute once they are read.

A field of a section is a path where its type says so: ``Annotated[str | None, FILE]``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_NO_NAMES = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)  # of paths that can never name anything


def absolute(path: str) -> str:
    """Return an absolute path for one that is relative to this process's folder, or begins with ``~``.

    Raises PydanticCustomError, a ValueError whose text says what is allowed, for texts that no path can be.
    """
    if not path:
        raise PydanticCustomError("path", "a path, which is not empty")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise PydanticCustomError("path", "a path; no user of this machine has the name behind ~ (./~ for a file)")
    try:
        joined = os.path.join(os.getcwd(), expanded)
        os.stat(joined)
    except ValueError:
        raise PydanticCustomError("path", "a path without null characters, in this system's encoding") from None
    except OSError as error:
        if error.errno in _NO_NAMES:
            raise PydanticCustomError("path", f"a path that this system can follow ({error.strerror})") from None
    plain = os.path.normpath(joined)
    return plain if os.path.realpath(plain) == os.path.realpath(joined) else joined  # `link/..` is not here


def _folder_or_uri(text: str) -> str:
    """A folder, made absolute, or an fsspec URI; ``file://`` is a folder."""
    scheme, separator, rest = text.partition("://")
    if "::" in text:  # fsspec's way to nest file systems
        raise PydanticCustomError("path", "a folder or a URI, without '::'")
    if not separator:
        return absolute(text)
    if scheme in ("file", "local"):
        return absolute(rest)
    if not scheme.replace("+", "").isalnum() or not rest.strip("/"):
        raise PydanticCustomError("path", "a folder, or a URI such as s3://BUCKET/FOLDER")
    return text


def _file_or_word(text: str) -> str:
    """A file, made absolute where the text has a folder or a suffix, or one of certain words."""
    is_file = os.sep in text or text.startswith("~") or os.path.splitext(text)[1]
    return absolute(text) if is_file or not text else text


@dataclass(frozen=True)
class PathKind:
    """A kind of setting that is a path: marks a field's type, and makes its values absolute when they are read."""

    absolute: Callable[[str], str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._read, handler(source))

    def _read(self, value: str | None) -> str | None:
        return None if value is None else self.absolute(value)


FILE = PathKind(absolute)  # or a folder
FILE_OR_WORD = PathKind(_file_or_word)
FOLDER_OR_URI = PathKind(_folder_or_uri)
