"""Which files of a folder tree are a data set's images, and one line about what else lies there and is not read."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from fedprompt.data.sources.pictures import ENDINGS, Picture
from fedprompt.errors import InputError
from fedprompt.texts import printable

CLUTTER = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "icon\r"}  # of systems


class Unread:
    """What lies below ``root`` and is not read: how many of each kind, and the first of each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[str, list[Path]] = defaultdict(list)

    def add(self, kind: str, path: Path) -> None:
        """Remember one path of a kind, which is named in the plural."""
        self._found[kind].append(path)

    def of(self, folder: Path) -> str:
        """Say what was found in one folder, such as ``files of other endings (3, such as a.heic)``, or ``nothing``."""
        inside = {kind: [p for p in paths if p.parent == folder] for kind, paths in self._found.items()}
        return self._listed({kind: paths for kind, paths in inside.items() if paths}) or "nothing"

    def notes(self) -> tuple[str, ...]:
        """Return the line for the user, or none where everything was read."""
        return (f"{self._root}: not read: {self._listed(self._found)}",) if self._found else ()

    def _listed(self, found: dict[str, list[Path]]) -> str:
        shown = {kind: printable(str(paths[0].relative_to(self._root)), 80) for kind, paths in found.items()}
        return "; ".join(f"{kind} ({len(paths)}, such as {shown[kind]})" for kind, paths in found.items())


def is_clutter(name: str) -> bool:
    """Whether a name is that of a hidden file or folder, or of one that an operating system puts there."""
    return name.startswith(".") or name.lower() in CLUTTER


def subfolders(folder: Path, unread: Unread) -> list[str]:
    """Return the names of the folders in ``folder``, sorted; system's and hidden ones, and files, are not read."""
    names = []
    for item in _items(folder):
        if is_clutter(item.name):
            unread.add("hidden or system files", item)
        elif item.is_dir():
            names.append(name_of(item))
        else:
            unread.add("files beside class folders", item)
    return names


def image_files(folder: Path, unread: Unread) -> list[Path]:
    """Return the image files of a folder, sorted by name, whatever the case of their endings."""
    files = []
    for item in _items(folder):
        if is_clutter(item.name):
            unread.add("hidden or system files", item)
        elif item.is_dir():
            unread.add("folders within class folders", item)
        elif item.suffix.lower() in ENDINGS:
            files.append(item)
        else:
            unread.add("files of other endings", item)
    return files


def by_class(folder: Path, classes: list[str], unread: Unread, inner: str = ".") -> tuple[list[Path], list[int]]:
    """Return the image files of ``folder/<class>/inner`` and their labels; InputError if there is none at all."""
    files = [(path, label) for label, name in enumerate(classes) for path in image_files(folder / name / inner, unread)]
    if not files:
        raise InputError(f"{folder}: no images in its {len(classes)} class folders ({', '.join(sorted(ENDINGS))})")
    return [path for path, _ in files], [label for _, label in files]


def note_beside(root: Path, wanted: Iterable[str], unread: Unread) -> None:
    """Remember the folders and images in ``root`` that lie beside the folders ``wanted``."""
    for item in _items(root):
        if item.name not in wanted and not item.name.startswith("."):
            if item.is_dir():
                unread.add("folders beside those of the data set", item)
            elif item.suffix.lower() in ENDINGS:
                unread.add("images outside of class folders", item)


def note_unlisted(folder: Path, listed: set[str], unread: Unread) -> None:
    """Remember the images of a folder that its list of files does not name."""
    for path in image_files(folder, unread):
        if path.name not in listed:
            unread.add("images that are not in the list of files", path)


def note_more_images(paths: list[Path], pictures: list[Picture], unread: Unread) -> None:
    """Remember the files that hold several images, of which only the first was read."""
    for path, picture in zip(paths, pictures):
        if picture.more:
            unread.add("images after the first of their file", path)


def alike(names: Iterable[str]) -> list[str]:
    """Return a line for each set of class names that differ only in case or in the way that Unicode is composed."""

    def key(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    groups = [list(group) for _, group in groupby(sorted(names, key=key), key)]
    return [
        f"the classes {' and '.join(repr(name) for name in group)} differ only in case or composition, and count as "
        f"{len(group)} classes"
        for group in groups
        if len(group) > 1
    ]


def _items(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted; InputError if it is missing or cannot be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: this folder of the data set is missing")
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); allowed: a readable folder") from None


def name_of(folder: Path) -> str:
    """Return a folder's name; InputError where its bytes are no text, so that no table or file could hold it."""
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{printable(str(folder), 200)}: the name is no UTF-8 text; rename this class folder"
        ) from None
    return folder.name
