"""CIFAR-10 and CIFAR-100 from the Python pickles of the original distribution, in a folder or in the archive itself."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.registry import dataset
from fedprompt.errors import InputError
from fedprompt.files import read_regular

MOST = 2**29  # bytes of a file; the archives have 170 million

# What the pickles of NumPy arrays name, under the module names of NumPy 1 and 2. Nothing else is ever looked up.
_ADMITTED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype} | {
    (module, "_reconstruct"): np.empty(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and NumPy arrays, and refuses every other class or function before it is imported."""

    def find_class(self, module: str, name: str) -> object:
        """Return an admitted name's object; raise UnpicklingError for any other."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for '{module}.{name}', only NumPy arrays are admitted")
        return _ADMITTED[module, name]


def read_pickle(content: bytes, where: str) -> dict:
    """Return the dict in a Python 2 or 3 pickle, keys as bytes; nothing in it is executed. InputError if damaged."""
    try:
        # encoding=bytes: Python 2's strings hold image bytes
        loaded = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{where}: not a pickle of arrays, truncated or damaged ({reason}); get the file again"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"{where}: holds a {type(loaded).__name__}; allowed: the dict of the original distribution")
    return {key.encode() if isinstance(key, str) else key: value for key, value in loaded.items()}


@dataclass(frozen=True)
class Layout:
    """Names inside one of the two distributions."""

    name: str
    folder: str
    archive: str
    md5: str  # of the archive, as published on the data set's page
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    label_names: bytes


CIFAR10 = Layout(
    name="cifar10",
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels=b"labels",
    label_names=b"label_names",
)
CIFAR100 = Layout(
    name="cifar100",
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    train=("train",),
    test=("test",),
    meta="meta",
    labels=b"fine_labels",
    label_names=b"fine_label_names",
)


def _contents(layout: Layout, folder: Path) -> dict[str, bytes]:
    """Return the files of the distribution by name, from the unpacked folder or else from the archive."""
    names = (*layout.train, *layout.test, layout.meta)
    archive = folder / layout.archive
    if (folder / layout.train[0]).is_file():
        missing = [name for name in names if not (folder / name).exists()]
        contents = {name: read_regular(folder / name, most=MOST) for name in names if name not in missing}
    else:
        contents = _unpack(archive, layout, names)
        missing = [name for name in names if name not in contents]
    if missing:
        raise InputError(f"{folder}: {missing[0]} of {layout.name} is missing; wanted: {', '.join(names)}")
    return contents


def _unpack(archive: Path, layout: Layout, names: tuple[str, ...]) -> dict[str, bytes]:
    """Read the wanted members of the archive into memory, after comparing its MD5."""
    content = read_regular(archive, most=MOST)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != layout.md5:
        raise InputError(f"{archive}: MD5 is {found}, the published archive's is {layout.md5}; truncated, damaged or"
                         " not the original, get it again")  # fmt: skip
    wanted = {f"{layout.folder}/{name}": name for name in names}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return {wanted[m.name]: tar.extractfile(m).read() for m in tar if m.isfile() and m.name in wanted}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{archive}: cannot be unpacked ({error}); get the file again") from error


def _batch(content: bytes, layout: Layout, where: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images [n, 32, 32, 3] and labels [n] of one batch: rows of 1,024 red, 1,024 green, 1,024 blue bytes."""
    batch = read_pickle(content, where)
    data, labels = batch.get(b"data"), batch.get(layout.labels)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072):
        raise InputError(f"{where}: 'data' is no uint8 array [n, 3072]; not the original file, or damaged")
    if not (isinstance(labels, list) and len(labels) == len(data) and all(isinstance(k, int) for k in labels)):
        raise InputError(f"{where}: '{layout.labels.decode()}' is no list of {len(data)} whole numbers; not the"
                         " original file, or damaged")  # fmt: skip
    if len(labels) and not 0 <= min(labels) <= max(labels) < classes:
        raise InputError(f"{where}: labels from {min(labels)} to {max(labels)}; allowed: 0 to {classes - 1}")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _load(layout: Layout, folder: Path) -> Dataset:
    contents = _contents(layout, folder)
    names = read_pickle(contents[layout.meta], str(folder / layout.meta)).get(layout.label_names)
    if not (isinstance(names, list) and names and all(isinstance(name, (bytes, str)) for name in names)):
        raise InputError(f"{folder / layout.meta}: '{layout.label_names.decode()}' is no list of names; damaged")
    class_names = tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)

    def split(files: tuple[str, ...]) -> Split:
        parts = [_batch(contents[file], layout, str(folder / file), len(class_names)) for file in files]
        images, labels = zip(*parts)
        return Split.of(np.concatenate(images), np.concatenate(labels))

    return Dataset(layout.name, split(layout.train), split(layout.test), class_names)


@dataset(
    "cifar10",
    about="CIFAR-10: 50,000 + 10,000 colour photographs, 32x32, 10 classes",
    get="'CIFAR-10 python version' (cifar-10-python.tar.gz) from www.cs.toronto.edu/~kriz/cifar.html",
    marks=("cifar-10-batches-py/data_batch_1", "data_batch_1", "cifar-10-python.tar.gz"),
)
def cifar10(folder: Path) -> Dataset:
    """Load CIFAR-10 (Krizhevsky 2009)."""
    return _load(CIFAR10, folder)


@dataset(
    "cifar100",
    about="CIFAR-100: 50,000 + 10,000 colour photographs, 32x32, 100 classes",
    get="'CIFAR-100 python version' (cifar-100-python.tar.gz) from www.cs.toronto.edu/~kriz/cifar.html",
    marks=("cifar-100-python/train", "cifar-100-python.tar.gz", "train"),
)
def cifar100(folder: Path) -> Dataset:
    """Load CIFAR-100 with its 100 fine classes (Krizhevsky 2009)."""
    return _load(CIFAR100, folder)
