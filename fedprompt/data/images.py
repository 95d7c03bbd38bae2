"""Where images lie: memory that the processes of a host share.

A large data set is held once on its host. Whoever reads it there, this process or a worker, picks the rows of a batch
out of the same pages; only a process on another host needs copies.
"""

from __future__ import annotations

import mmap
import os
import uuid
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


class NotHere(Exception):
    """The memory of a handle is not this host's, or its owner has ended."""


def empty(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, uint8, in memory that other processes of this host can map, where the system has such (Linux)."""
    size = int(np.prod(shape))
    if not hasattr(os, "memfd_create") or not size:
        return np.zeros(shape, dtype=np.uint8)
    return np.ndarray(shape, dtype=np.uint8, buffer=_Shared.of(size))


class _Shared(mmap.mmap):
    """A mapping that knows where another process finds it; its pages go back with the last process that maps them."""

    place: int
    name: str

    @classmethod
    def of(cls, size: int) -> _Shared:
        name = f"images-{uuid.uuid4().hex}"
        place = os.memfd_create(name)
        os.ftruncate(place, size)
        made = cls(place, size)
        made.place, made.name = place, name
        return made

    def __del__(self) -> None:
        if hasattr(self, "place"):
            os.close(self.place)


@dataclass(frozen=True)
class Handle:
    """Where an array lies, for other processes of its host: the file that process ``pid`` has open as ``place``."""

    pid: int
    place: int
    name: str  # random, so that no other host's process can have the same
    shape: tuple[int, ...]

    @staticmethod
    def of(array: np.ndarray) -> Handle | None:
        """The handle of a whole array made by ``empty``; None of any other."""
        base = array.base
        if not isinstance(base, _Shared) or array.nbytes != len(base) or not array.flags.c_contiguous:
            return None
        return Handle(os.getpid(), base.place, base.name, array.shape)

    def open(self) -> np.ndarray:
        """The array itself, read-only. Raises NotHere where this process cannot reach it."""
        return _opened(self)


@lru_cache(maxsize=16)
def _opened(handle: Handle) -> np.ndarray:
    path = f"/proc/{handle.pid}/fd/{handle.place}"
    try:
        if handle.name not in os.readlink(path):  # the number now means another process, or another file of it
            raise NotHere(path)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise NotHere(path) from error
    return np.ndarray(handle.shape, dtype=np.uint8, buffer=mapped)
