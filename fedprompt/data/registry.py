"""Data sets by name: a loader is one function with ``@dataset``, and is found where its files lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedprompt.data.dataset import Dataset
from fedprompt.errors import InputError, did_you_mean
from fedprompt.registry import Registered, Registry, why_missing

ENVIRONMENT = "FEDPROMPT_DATA"  # names the folder that holds a subfolder per data set

Loader = Callable[[Path], Dataset]


@dataclass(frozen=True)
class DatasetInfo:
    """A data set in one line each: what it is, whether its files are here, and how to get them."""

    name: str
    about: str
    present: bool
    get: str


@dataclass(frozen=True)
class RegisteredDataset(Registered[Loader]):
    """A data set, and where its files may lie."""

    get: str  # how to get the files
    marks: tuple[str, ...]
    also: tuple[str, ...]
    needs_root: bool

    def places(self, root: Path | None) -> list[Path]:
        """Return the folders in which the files may lie."""
        if root is not None:
            return [root / self.name, root]
        return [] if self.needs_root else [default_root() / self.name, *map(Path, self.also)]

    def find(self, root: Path | None) -> Path | None:
        """Return the folder that holds the first mark found, or None. Without marks nothing is needed."""
        if not self.marks:
            return Path()
        for place in self.places(root):
            for mark in self.marks:
                hit = next(iter(_marked(place, mark)), None)
                if hit is not None:
                    return hit.parents[0] if not mark.startswith("*/") else place
        return None

    def mistaken(self, root: Path | None) -> str:
        """Say which file lies where a folder is wanted, or the other way round; an empty string for none."""
        for place in self.places(root):
            for mark in self.marks:
                for hit in sorted(place.glob(mark.rstrip("/"))):
                    return f" ({hit} is {'no folder' if mark.endswith('/') else 'no file'})"
        return ""


def _marked(place: Path, mark: str) -> list[Path]:
    """Return the paths that a mark finds, sorted: files, or folders where it ends in a slash."""
    is_wanted = Path.is_dir if mark.endswith("/") else Path.is_file
    return sorted(path for path in place.glob(mark.rstrip("/")) if is_wanted(path))


DATASETS: Registry[RegisteredDataset] = Registry(
    "datasets", noun="data set", key="data.name", package="fedprompt.data.sources"
)


def dataset(
    name: str,
    *,
    about: str,
    get: str,
    marks: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    needs_root: bool = False,
    source: str = "",
) -> Callable[[Loader], Loader]:
    """Register ``loader(folder) -> Dataset`` as ``data.name=name``.

    ``about``, ``get`` and ``source`` are a line each. ``marks`` are file patterns, relative to a place, one of which
    shows that the data set is there (those of folders end in ``/``); the loader gets the folder in which the marked
    file lies (a mark ``*/…`` only looks into subfolders: the loader gets the place). Without marks the data set comes
    with the package. ``also`` are folders outside the default location; ``needs_root``: there is no default location at
    all. Raises InputError where another function has the name.
    """

    def register(loader: Loader) -> Loader:
        DATASETS.add(RegisteredDataset(name, about, source, loader, get, marks, also, needs_root))
        return loader

    return register


def default_root() -> Path:
    """Return the folder with a subfolder per data set: ``$FEDPROMPT_DATA``, else ``~/.cache/fedprompt/data``."""
    given = os.environ.get(ENVIRONMENT)
    return Path(os.path.expanduser(given)) if given else Path.home() / ".cache" / "fedprompt" / "data"


def available(root: str | None = None) -> list[DatasetInfo]:
    """List all data sets; ``present`` looks for the files' names only, it does not read them."""
    folder = None if root is None else _folder(root)
    entries = sorted(DATASETS.available(), key=lambda entry: (bool(entry.marks), entry.name))  # embedded ones first
    return [DatasetInfo(e.name, e.about, e.find(folder) is not None, e.get) for e in entries]


def load(name: str, root: str | None = None) -> Dataset:
    """Load a data set by name, or several joined with ``+`` into one of several domains (see ``multi.join``).

    ``root`` is the folder with the files, or one with a subfolder per data set; None: the default location. Raises
    InputError for an unknown name, for files that are missing (with the ways to get them) or damaged.
    """
    from fedprompt.data.multi import join

    folder = None if root is None else _folder(root)
    names = name.split("+")
    for one in names:
        if DATASETS.find(one) is None:
            known = DATASETS.names()
            raise InputError(f"data.name: unknown data set '{one}'{did_you_mean(one, known)}; allowed:"
                             f" {', '.join(known)}, or several joined with '+'{why_missing()}")  # fmt: skip
        if names.count(one) > 1:
            raise InputError(f"data.name: '{one}' is joined with itself; give different data sets")
    loaded = [_load_one(DATASETS.get(one), folder) for one in names]
    return loaded[0] if len(loaded) == 1 else join(loaded)


def _folder(root: str) -> Path:
    folder = Path(os.path.expanduser(root))
    if not folder.is_dir():
        raise InputError(f"data.root: '{root}' is no folder; give the folder that holds the data set's files")
    return folder


def _load_one(entry: RegisteredDataset, root: Path | None) -> Dataset:
    found = entry.find(root)
    if found is None:
        if root is None and entry.needs_root:
            raise InputError(f"data.root: the data set '{entry.name}' needs a folder; {entry.get}")
        places = " or ".join(str(place) for place in entry.places(root))
        key, way = (
            ("data.name", "put it there or give data.root=DIR") if root is None else ("data.root", "put it there")
        )
        raise InputError(f"{key}: files of '{entry.name}' not found, looked for {' or '.join(entry.marks)} in {places}"
                         f"{entry.mistaken(root)};"
                         f" to get it: {entry.get}; then {way}")  # fmt: skip
    return entry.thing(found)
