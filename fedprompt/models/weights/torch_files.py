"""Files of ``torch.save``, read without executing anything in them and in no more memory than they are long."""

from __future__ import annotations

import warnings
import zipfile
from typing import IO, Any

import torch

from fedprompt.errors import InputError

# Before, `weights_only=True` could be made to execute code: CVE-2025-32434 (below 2.6), CVE-2026-24747 (below 2.10).
LEAST = "2.10"


def load_plain(file: IO[bytes]) -> Any:
    """Return the tensors, numbers and texts in a file, on the CPU.

    Raises InputError where this torch is too old to be given such a file, something else where it is damaged, holds
    anything but plain values, or would take more memory than it is long.
    """
    if torch.__version__ < LEAST:
        raise InputError(
            f"torch {torch.__version__} can be made to run code by a file of tensors; allowed: torch {LEAST} or newer"
        )
    if zipfile.is_zipfile(file):
        _check_archive(file)
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged files, in many lines
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_archive(file: IO[bytes]) -> None:
    """Raise ValueError where an archive holds more than its length, or was damaged: torch compares no checksums."""
    length = file.seek(0, 2)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("a part of it is compressed")
        if sum(entry.file_size for entry in entries) > length:
            raise ValueError("its parts are longer than the file")
        if broken := archive.testzip():
            raise ValueError(f"wrong checksum of {broken}")
