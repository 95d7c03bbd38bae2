"""MNIST and Fashion-MNIST in the IDX format of the original distributions, plain or gzipped."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.registry import dataset
from fedprompt.data.sources.embedded import FASHION_CLASSES
from fedprompt.errors import InputError
from fedprompt.files import open_regular

MOST = 2**30  # bytes of one file's data; MNIST has 47 million
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts the files
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the unpacked files, since repacked .gz files (Debian's) differ in the header. Put under the original
# header, Debian's files have the MD5 sums that the Fashion-MNIST page publishes for its .gz files.
FASHION_SHA256 = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
_MARKS = ("train-images-idx3-ubyte*", "train-images.idx3-ubyte*")


def read_array(path: Path) -> tuple[np.ndarray, str]:
    """Return the uint8 array of an IDX file, unpacked if its name ends in .gz, and the SHA-256 of its content.

    The format: two zero bytes, type 8, number of axes, their lengths, then the data. No more is read or unpacked than
    the header asks for. InputError if the file is missing, damaged, or asks for more than ``MOST`` bytes.
    """
    with open_regular(path) as file:
        try:
            with gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else nullcontext(file) as content:
                return _parse(content, path)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: cannot be read, truncated or damaged ({error}); get the file again") from error


def _parse(content: BinaryIO, path: Path) -> tuple[np.ndarray, str]:
    start = content.read(4)
    axes = start[3] if len(start) == 4 else 0
    if start[:3] != b"\0\0\x08" or not 1 <= axes <= 3:
        raise InputError(f"{path}: not an IDX file of bytes (starts with {start.hex() or 'nothing'}, allowed:"
                         " 00000801 for labels, 00000803 for images)")  # fmt: skip
    lengths = content.read(4 * axes)
    shape = tuple(int(n) for n in np.frombuffer(lengths.ljust(4 * axes, b"\xff"), dtype=">u4"))
    wanted = math.prod(shape)
    if len(lengths) == 4 * axes and wanted > MOST:
        raise InputError(f"{path}: its header asks for {wanted:,} bytes ({' x '.join(map(str, shape))}); allowed: at"
                         f" most {MOST:,}")  # fmt: skip
    data = content.read(wanted + 1) if len(lengths) == 4 * axes else b""  # one more, to see whether the file ends there
    if len(data) != wanted:
        found = "more bytes than the header asks for" if len(data) > wanted else f"{len(data):,} bytes of data"
        raise InputError(f"{path}: truncated or damaged, {found} where the header asks for {wanted:,};"
                         " get the file again")  # fmt: skip
    return np.frombuffer(data, dtype=np.uint8).reshape(shape), hashlib.sha256(start + lengths + data).hexdigest()


def _read(folder: Path, stem: str) -> tuple[np.ndarray, str]:
    """Return the array of ``stem`` or ``stem.gz`` (also with a dot before ``idx``) and its content's SHA-256."""
    names = [name + end for name in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz")]
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        raise InputError(f"{folder}: {stem}[.gz] is missing; the four files of the data set must lie together")
    return read_array(next((path for path in present if path.is_file()), present[0]))


def _load(name: str, folder: Path, class_names: tuple[str, ...]) -> Dataset:
    splits = {}
    for part, stems in FILES.items():
        (images, images_hash), (labels, _) = _read(folder, stems[0]), _read(folder, stems[1])
        if images.ndim != 3 or labels.shape != images.shape[:1] or not images.size:
            raise InputError(f"{folder}: {stems[0]} has shape {images.shape} and {stems[1]} {labels.shape}; allowed:"
                             " [n, H, W] and [n], each at least 1")  # fmt: skip
        if labels.max() >= len(class_names):
            raise InputError(f"{folder}: {stems[1]} holds label {labels.max()}; allowed: 0 to {len(class_names) - 1}")
        _check_identity(name, folder / stems[0], images_hash, len(images) == (60_000 if part == "train" else 10_000))
        splits[part] = Split.of(images.copy(), labels)
    return Dataset(name, splits["train"], splits["test"], class_names)


def _check_identity(name: str, path: Path, found: str, full_size: bool) -> None:
    """Refuse one data set's images under the other's name: the files of both are called the same."""
    known = FASHION_SHA256[path.name]
    if name == "mnist" and found == known:
        raise InputError(f"{path}: these are Fashion-MNIST's images, not MNIST's; set data.name=fashion-mnist")
    if name == "fashion-mnist" and full_size and found != known:
        raise InputError(f"{path}: not Fashion-MNIST's images (SHA-256 of the unpacked file {found[:12]}…, expected"
                         f" {known[:12]}…); damaged or another data set")  # fmt: skip


@dataset(
    "fashion-mnist",
    about="Fashion-MNIST: 60,000 + 10,000 images, 28x28 grey, 10 classes of clothing",
    get="Debian: apt install dataset-fashion-mnist; or four .gz files from github.com/zalandoresearch/fashion-mnist",
    marks=(*_MARKS, *(f"FashionMNIST/raw/{mark}" for mark in _MARKS)),
    also=(FASHION_FOLDER,),
)
def fashion_mnist(folder: Path) -> Dataset:
    """Load the full Fashion-MNIST (Xiao et al. 2017)."""
    return _load("fashion-mnist", folder, FASHION_CLASSES)


@dataset(
    "mnist",
    about="MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, 10 classes",
    get="the four .gz files from yann.lecun.com/exdb/mnist or its mirror ossci-datasets.s3.amazonaws.com/mnist",
    marks=(*_MARKS, *(f"MNIST/raw/{mark}" for mark in _MARKS)),
)
def mnist(folder: Path) -> Dataset:
    """Load MNIST (LeCun et al. 1998)."""
    return _load("mnist", folder, tuple(str(digit) for digit in range(10)))
