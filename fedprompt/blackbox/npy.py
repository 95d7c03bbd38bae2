"""Arrays of float32 as the bytes of a .npy file, read without trust in whoever sent them.

The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html. NumPy's own reader takes much more
than is needed here, and fails on a damaged header in many ways.
"""

from __future__ import annotations

import ast
import io
import struct
from typing import Any

import numpy as np

MAGIC = b"\x93NUMPY"
LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}  # by version, how the header's length is written
LONGEST = 1000  # bytes of a header: NumPy writes about 118 for four dimensions
KEYS = {"descr", "fortran_order", "shape"}
FLOAT32 = "<f4"
DIMENSIONS = 8


def to_npy(array: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array), allow_pickle=False)
    return file.getvalue()


def from_npy(data: bytes | bytearray) -> np.ndarray:
    """The float32 array in the bytes of a .npy file, of which nothing is copied or executed.

    Raises ValueError, with one line, for all that is not exactly that: other formats and dtypes, Fortran order, a shape
    that is no tuple of counts, fewer or more bytes than the shape says.
    """
    descr, fortran, shape, start = _header(data)
    if not _is_shape(shape):
        raise ValueError(f"a .npy of shape {_short(shape)}; allowed: a tuple of at most {DIMENSIONS} counts")
    if descr != FLOAT32:
        raise ValueError(f"a .npy of dtype {_short(descr)} {_short(shape)}; allowed: float32, which is {FLOAT32!r}")
    if fortran is not False:
        raise ValueError(f"a .npy with fortran_order {_short(fortran)}; allowed: False")
    expected = 4
    for count in shape:
        expected *= count
    if len(data) - start != expected:
        raise ValueError(f"a .npy of shape {_short(shape)} with {len(data) - start} bytes of data; allowed: {expected}")
    return np.frombuffer(data, FLOAT32, offset=start).reshape(shape)


def _header(data: bytes | bytearray) -> tuple[Any, Any, Any, int]:
    """Return ``descr``, ``fortran_order`` and ``shape`` as they stand there, and where the array's own bytes begin."""
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("no .npy file; allowed: the bytes that numpy.save writes of a float32 array")
    version = tuple(data[6:8])
    if version not in LENGTHS:
        raise ValueError(f"a .npy of version {'.'.join(map(str, version))}; allowed: 1.0, 2.0, 3.0")
    start = 8 + struct.calcsize(LENGTHS[version])
    length = int.from_bytes(data[8:start], "little")
    if length > LONGEST or len(data) < start + length:
        raise ValueError(f"a .npy with a header of {length} bytes; allowed: at most {LONGEST}, all of them there")
    try:
        header = ast.literal_eval(bytes(data[start : start + length]).decode("utf-8").strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval is said to raise
        raise ValueError("a .npy whose header cannot be read; allowed: what numpy.save writes") from None
    if not isinstance(header, dict) or set(header) != KEYS:
        raise ValueError(f"a .npy whose header has not {', '.join(sorted(KEYS))}; allowed: what numpy.save writes")
    return header["descr"], header["fortran_order"], header["shape"], start + length


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, tuple) or len(shape) > DIMENSIONS:
        return False
    return all(type(count) is int and 0 <= count < 2**63 for count in shape)  # True and False are no counts


def _short(value: object) -> str:
    """A value from outside, in a few characters of one line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
