"""Make fedprompt/data/embedded/fashion_mnist_small.npz from the full Fashion-MNIST.

    python scripts/make_embedded.py --root /usr/share/datasets/fashion-mnist

takes 800 training and 200 test images of every class, at random but always the same ones; two runs write equal bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from fedprompt.data.sources.embedded import FASHION_FILE
from fedprompt.data.sources.idx import FASHION_SHA256, FILES, read_array
from fedprompt.errors import InputError

SEED = 0
PER_CLASS = {"train": 800, "test": 200}


def read_checked(root: Path, stem: str) -> np.ndarray:
    """Read an IDX file, plain or .gz, and raise InputError unless it is the published one."""
    path = root / stem if (root / stem).exists() else root / f"{stem}.gz"
    array, found = read_array(path)
    if found != FASHION_SHA256[stem]:
        raise InputError(f"{path}: SHA-256 of the unpacked file is {found}, expected {FASHION_SHA256[stem]}")
    return array


def choose(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Return the sorted indices of ``per_class`` random samples of every class."""
    keys = np.random.default_rng(seed).random(len(labels))
    order = np.lexsort((keys, labels))  # by class, then at random
    starts = np.searchsorted(labels[order], np.unique(labels))
    return np.sort(np.concatenate([order[start : start + per_class] for start in starts]))


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz whose bytes depend on the arrays only: fixed order, times and permissions."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=FASHION_FILE)
    arguments = parser.parse_args()
    arrays = {}
    try:
        for part, stems in FILES.items():
            images, labels = (read_checked(arguments.root, stem) for stem in stems)
            chosen = choose(labels, PER_CLASS[part], SEED)
            arrays |= {f"{part}_images": images[chosen], f"{part}_labels": labels[chosen]}
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    write(arguments.output, arrays)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes,"
          f" SHA-256 {hashlib.sha256(arguments.output.read_bytes()).hexdigest()}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
