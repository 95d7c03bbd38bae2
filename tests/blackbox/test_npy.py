"""Bodies from strangers: what is no float32 array is told in one line, and nothing in it is executed."""

import io
import random
import struct
import zipfile

import numpy as np
import pytest

from fedprompt.blackbox.npy import from_npy, to_npy

IMAGES = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
DATA = IMAGES.tobytes()
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4, 4), }"


def npy(header, data=DATA, version=b"\x01\x00"):
    """The bytes of a .npy file with a header of one's own."""
    text = header if isinstance(header, bytes) else header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def changed(before, after):
    assert before in HEADER
    return npy(HEADER.replace(before, after))


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", saved(IMAGES))
    return file.getvalue()


BAD = {
    "empty": b"",
    "text": b"rubbish",
    "an archive": zipped(),
    "the mark alone": b"\x93NUMPY",
    "the header's length alone": b"\x93NUMPY\x01\x00\x76\x00",
    "another version": npy(HEADER, version=b"\x09\x00"),
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100,
    "an open bracket": changed("(2", "((((2"),
    "deep brackets": npy("(" * 900),
    "deep signs": npy("-" * 900 + "1"),
    "zeros": npy("\0" * 60),
    "no text": npy(b"\xff\xfe" * 30),
    "code": npy("__import__('os').abort()"),
    "no dict": npy("(1, 2)"),
    "a key that cannot be one": npy("{[]: 1}"),
    "missing keys": npy("{'descr': '<f4'}"),
    "more keys": changed("{", "{'more': 1, "),
    "objects": changed("<f4", "|O"),
    "a pickle": npy(HEADER.replace("<f4", "|O"), b"cos\nabort\n(tR."),
    "a structure": changed("'<f4'", "[('a', '<f4')]"),
    "no dtype": changed("'<f4'", "None"),
    "another order of bytes": changed("<f4", ">f4"),
    "whole numbers": saved(np.zeros((2, 3, 4, 4), np.uint8)),
    "double precision": saved(IMAGES.astype(float)),
    "Fortran order": changed("False", "True"),
    "an order that is none": changed("False", "0"),
    "a billion images": changed("(2,", "(1000000000000,"),
    "more than can be multiplied": changed("(2,", "(9223372036854775807, 9223372036854775807,"),
    "True images": changed("(2,", "(True,"),
    "negative images": changed("(2,", "(-2,"),
    "infinite images": changed("(2,", "(1e400,"),
    "a number of 800 digits": changed("(2,", "(0x" + "f" * 660 + ","),
    "too many dimensions": changed("(2,", "(" + "1, " * 60 + "2,"),
    "a list for a shape": changed("(2, 3, 4, 4)", "[2, 3, 4, 4]"),
    "a number for a shape": changed("(2, 3, 4, 4)", "96"),
    "bytes behind the end": saved(IMAGES) + b"x",
    "bytes missing": saved(IMAGES)[:-1],
    "no bytes": npy(HEADER, b""),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_what_is_no_float32_array_is_told_in_one_short_line(body):
    with pytest.raises(ValueError, match="allowed") as error:
        from_npy(body)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 250


@pytest.mark.parametrize("array", [IMAGES, IMAGES[:, :, ::2], np.zeros((0, 3), np.float32), np.float32(3)])
def test_what_is_written_is_read_back_whoever_writes_it(array):
    for body in (to_npy(array), saved(np.ascontiguousarray(array).reshape(array.shape))):
        np.testing.assert_array_equal(from_npy(body), array)
        np.testing.assert_array_equal(from_npy(bytearray(body)), array)


def test_a_damaged_header_is_refused_or_means_what_it_says():
    rng, good, told, read = random.Random(0), saved(IMAGES), [], []
    for _ in range(500):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(128)] = rng.randrange(256)
        try:
            array = from_npy(body)
        except ValueError as error:
            told.append(str(error))
        else:
            read.append((array.size, array.dtype))
    assert told
    assert not any("\n" in line for line in told)
    assert set(read) <= {(IMAGES.size, np.dtype(np.float32))}
