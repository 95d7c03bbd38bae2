"""Data sets that are folders of image files: MNIST-M, Tiny ImageNet, CINIC-10, and the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.registry import dataset
from fedprompt.data.sources.listing import (
    Unread,
    alike,
    by_class,
    is_clutter,
    name_of,
    note_beside,
    note_more_images,
    note_unlisted,
    subfolders,
)
from fedprompt.data.sources.pictures import ENDINGS, SIDE, Picture, read_images, read_pictures
from fedprompt.errors import InputError, did_you_mean
from fedprompt.files import read_regular

MOST_TEXT = 2**26  # bytes of a list of files


def read_text(path: Path) -> list[str]:
    """Return the non-empty lines of a text file; InputError if it is missing or no text."""
    try:
        text = read_regular(path, most=MOST_TEXT).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read, damaged or no UTF-8 text ({error})") from error
    return [line for line in text.splitlines() if line.strip()]


@dataset(
    "mnist-m",
    about="MNIST-M: 59,001 + 9,001 digits over photographs, 32x32 colour, 10 classes",
    get="mnist_m.tar.gz, linked from the DANN authors' page yaroslav.ganin.net, unpacked",
    marks=("mnist_m_train_labels.txt", "mnist_m/mnist_m_train_labels.txt"),
)
def mnist_m(folder: Path) -> Dataset:
    """Load MNIST-M (Ganin et al., JMLR 2016): two folders of .png files, each with a list of "file label" lines."""
    unread = Unread(folder)

    def split(part: str) -> Split:
        listing = folder / f"mnist_m_{part}_labels.txt"
        rows = [line.split() for line in read_text(listing)]
        for row in rows:
            if len(row) != 2 or row[1] not in set("0123456789") or Path(row[0]).name != row[0]:
                raise InputError(f"{listing}: the line '{' '.join(row)}' is not 'FILE LABEL' with a label of 0 to 9")
        if not rows:
            raise InputError(f"{listing}: is empty; truncated, unpack the archive again")
        images = read_images([folder / f"mnist_m_{part}" / row[0] for row in rows])
        note_unlisted(folder / f"mnist_m_{part}", {row[0] for row in rows}, unread)
        return Split.of(images, np.array([int(row[1]) for row in rows]))

    train, test = split("train"), split("test")
    return Dataset("mnist-m", train, test, tuple(str(digit) for digit in range(10)), notes=unread.notes())


@dataset(
    "tiny-imagenet",
    about="Tiny ImageNet: 100,000 + 10,000 colour photographs, 64x64, 200 classes (its validation set is the test set)",
    get="tiny-imagenet-200.zip from cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked",
    marks=("wnids.txt", "tiny-imagenet-200/wnids.txt"),
)
def tiny_imagenet(folder: Path) -> Dataset:
    """Load Tiny ImageNet; its labelled validation set is the test set, for the labels of its own are not public."""
    wnids = [line.strip() for line in read_text(folder / "wnids.txt")]
    words = dict(line.split("\t", 1) for line in read_text(folder / "words.txt") if "\t" in line)
    unread = Unread(folder)
    paths, labels = by_class(folder / "train", wnids, unread, "images")
    annotations = folder / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in read_text(annotations)]
    for row in rows:
        if len(row) < 2 or row[1] not in wnids or Path(row[0]).name != row[0]:
            raise InputError(
                f"{annotations}: the line '{' '.join(row)}' is not 'FILE WNID …' with a class of wnids.txt"
            )
    if not rows:
        raise InputError(f"{annotations}: is empty; truncated, unpack the archive again")
    note_unlisted(folder / "val" / "images", {row[0] for row in rows}, unread)
    number = {wnid: label for label, wnid in enumerate(wnids)}
    test = Split.of(
        read_images([folder / "val" / "images" / row[0] for row in rows]),
        np.array([number[row[1]] for row in rows]),
    )
    class_names = tuple(words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids)
    train = Split.of(read_images(paths), np.array(labels))
    return Dataset("tiny-imagenet", train, test, class_names, notes=unread.notes())


CINIC_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataset(
    "cinic10",
    about="CINIC-10: 90,000 + 90,000 colour photographs, 32x32, 10 classes (its validation third is not used)",
    get="CINIC-10.tar.gz, linked from github.com/BayesWatch/cinic-10, unpacked",
    marks=("train/", "CINIC-10/train/"),
)
def cinic10(folder: Path) -> Dataset:
    """Load CINIC-10 (Darlow et al. 2018): its train and test thirds; validation is held out of train like anywhere."""
    unread = Unread(folder)

    def split(part: str) -> Split:
        paths, labels = by_class(folder / part, CINIC_CLASSES, unread)
        note_beside(folder / part, CINIC_CLASSES, unread)
        return Split.of(read_images(paths), np.array(labels))

    return Dataset("cinic10", split("train"), split("test"), tuple(CINIC_CLASSES), notes=unread.notes())


@dataset(
    "folder",
    about=f"your own images: train/CLASS/*, test/CLASS/* or DOMAIN/train/CLASS/*, cropped to {SIDE}x{SIDE} colour",
    get="give data.root=DIR with DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg, or DIR/DOMAIN/train/CLASS/*.jpg",
    marks=("train/", "*/train/"),
    needs_root=True,
)
def folder(folder: Path) -> Dataset:
    """Load a folder of images; with several domains, each lies in a folder of its own.

    Classes are the union over the domains; where domains differ in their classes, ``domain_classes`` says which have
    which.
    """
    unread = Unread(folder)
    roots, domains = _roots(folder, unread)
    held = [subfolders(root / "train", unread) for root in roots]
    classes = sorted(set().union(*held))
    train, pictures = _folder_split(roots, held, classes, "train", unread)
    test, _ = _folder_split(roots, held, classes, "test", unread)
    allowed = np.array([[name in names for name in classes] for names in held])
    width, height = np.median([picture.size for picture in pictures], axis=0).astype(int).tolist()
    return Dataset(
        name="folder",
        train=train,
        test=test,
        class_names=tuple(classes),
        domain_names=tuple(domains),
        domain_classes=None if allowed.all() else allowed,
        notes=(*unread.notes(), *(f"{folder}: {line}" for line in alike(classes))),
        pixels=(width, height),
    )


def _roots(folder: Path, unread: Unread) -> tuple[list[Path], list[str]]:
    """Return the folders that hold ``train`` and ``test``, and the names of their domains."""
    parts = ("train", "test")
    if (folder / "train").is_dir():
        note_beside(folder, parts, unread)
        return [folder], ["all"]
    found = sorted(item for item in folder.iterdir() if (item / "train").is_dir() and not is_clutter(item.name))
    domains = [name_of(item) for item in found]
    note_beside(folder, domains, unread)
    roots = [folder / name for name in domains]
    for root in roots:
        note_beside(root, parts, unread)
    return roots, domains


def _folder_split(
    roots: list[Path], held: list[list[str]], classes: list[str], part: str, unread: Unread
) -> tuple[Split, list[Picture]]:
    """Read one split of all domains; a class that a domain's training images lack is refused."""
    paths: list[Path] = []
    labels: list[int] = []
    domains: list[int] = []
    for domain, (root, names) in enumerate(zip(roots, held)):
        if not (root / part).is_dir():
            raise InputError(f"{root / part}: this folder is missing; wanted: train/CLASS/* and test/CLASS/*")
        present = names if part == "train" else subfolders(root / part, unread)
        for name in present:
            if name not in names:
                hint = did_you_mean(name, names)
                raise InputError(f"{root / part / name}: class '{name}' has no folder in {root / 'train'}{hint}")
        found, positions = by_class(root / part, present, unread)
        _check_classes(root / part, present, positions, unread)
        paths += found
        labels += [classes.index(present[position]) for position in positions]
        domains += [domain] * len(found)
    images, pictures = read_pictures(paths, square=True)
    note_more_images(paths, pictures, unread)
    return Split.of(images, np.array(labels), np.array(domains)), pictures


def _check_classes(folder: Path, classes: list[str], labels: list[int], unread: Unread) -> None:
    """Refuse a class folder without an image in training; in the test set its class is only not tested."""
    for name in (name for label, name in enumerate(classes) if label not in set(labels)):
        if folder.name == "train":
            raise InputError(f"{folder / name}: no image in this class folder, found: {unread.of(folder / name)};"
                             f" put images there ({', '.join(sorted(ENDINGS))}) or remove the folder")  # fmt: skip
        unread.add("class folders without an image", folder / name)
