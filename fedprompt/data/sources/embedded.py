"""The data sets that come along: a part of Fashion-MNIST inside the package, and scikit-learn's digits."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.registry import dataset
from fedprompt.data.sampling import stratified
from fedprompt.errors import InputError

FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot")  # fmt: skip
FASHION_FILE = Path(__file__).parents[1] / "embedded" / "fashion_mnist_small.npz"
DIGITS_TEST_SHARE = 0.2
DIGITS_SEED = 0  # of the fixed split; part of every result on digits


@dataset(
    "fashion-mnist-small",
    about="8,000 + 2,000 images of Fashion-MNIST, 28x28 grey, 10 classes of clothing, balanced (embedded)",
    get="comes with fedprompt",
)
def fashion_mnist_small(folder: Path) -> Dataset:
    """Load the embedded part of Fashion-MNIST."""
    return read_npz("fashion-mnist-small", FASHION_FILE, FASHION_CLASSES)


def read_npz(name: str, path: Path, class_names: tuple[str, ...]) -> Dataset:
    """Read the four arrays that ``scripts/make_embedded.py`` writes; InputError if the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train = Split.of(arrays["train_images"], arrays["train_labels"])
            test = Split.of(arrays["test_images"], arrays["test_labels"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not the embedded data set ({error}); reinstall fedprompt") from error
    return Dataset(name, train, test, class_names)


@dataset(
    "digits",
    about="scikit-learn's handwritten digits: 1,438 + 359 images, 8x8 grey, 10 classes (embedded)",
    get="comes with scikit-learn",
)
def digits(folder: Path) -> Dataset:
    """Load scikit-learn's digits, split 80/20 by class once and for all; grey values 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    whole = Split.of(np.rint(bunch.images * (255 / 16)).astype(np.uint8), bunch.target)
    size = round(DIGITS_TEST_SHARE * len(whole))
    held_out = stratified(whole.labels, size, np.random.default_rng(DIGITS_SEED))
    kept = np.setdiff1d(np.arange(len(whole)), held_out)
    return Dataset("digits", whole.take(kept), whole.take(held_out), tuple(str(digit) for digit in range(10)))
