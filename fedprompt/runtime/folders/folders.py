"""Which files of a folder are a run's, a report's or another output's: nothing else is ever replaced.

A run's files are known by their names, in a folder that says by a file of its own that a run was there. Where that file
is missing, files of these names are the user's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from fedprompt.config.schema import Config
from fedprompt.errors import InputError
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.run_files import OWN_FILES

Kind = Literal["run", "report", "partition", "export"]
CHECKPOINT = "round_" + "[0-9]" * 6 + "*.pt"
EARLIER = CHECKPOINT.replace("round", "earlier")
PERSONALIZED = ("personalize.yaml", "personalize.csv", "curve.csv", "curve.png", "result.json", "error.txt")
# in order: what a run's folder holds for sure comes first in messages
OWN = (
    *("config.yaml", *OWN_FILES, "error.txt"),
    *(f"checkpoints/{name}" for name in (CHECKPOINT, "best.pt", EARLIER, f"{CHECKPOINT}.part", "best.pt.part")),
    *(f"tensorboard/{name}" for name in ("events.out.tfevents.*", "projector_config.pbtxt")),
    *("tensorboard/projector/tensors.tsv", "tensorboard/projector/metadata.tsv"),
    "pools/round_[0-9]*.npy",
    *(f"personalize/{name}" for name in PERSONALIZED),
)
FOLDERS = ("checkpoints", "tensorboard/projector", "tensorboard", "pools", "personalize")


def own_files(output: Path) -> list[Path]:
    """The files in ``output`` that have names of a run's files, in the order of ``OWN``; half-written ones last.

    Those of another run, which a user has put where clients' personalization goes, are not among them.
    """
    temporary = [f"{Path(name).parent}/.{Path(name).name}.[0-9]*.tmp" for name in OWN]
    found = [path for pattern in (*OWN, *temporary) for path in sorted(output.glob(pattern))]
    other = output / "personalize"
    return [path for path in found if path.parent != other or not mark_of(other, "run").exists()]


def check_replaceable(output: Path, inputs: Iterable[tuple[str, Path]], overwrite: bool) -> list[Path]:
    """Return what a new run in ``output`` replaces. ``inputs``: files and folders that it reads, under their names.

    Raises InputError where there is something of the user's that it would replace, or a run without ``overwrite``.
    """
    for name in FOLDERS:
        if (output / name).exists() and not (output / name).is_dir():
            raise InputError(f"--output: {output / name} is a file, where a run has a folder; allowed: another folder")
    present = own_files(output)
    if present and not holds_a_run(output):
        raise InputError(
            f"--output: {present[0]} was not written by a run, which has a file of that name; allowed: another folder"
        )
    for name, path in inputs:
        if any(_is_in(file, path, output) for file in present):
            raise InputError(f"--output: {output} holds {path}, which is given as {name}; allowed: another folder")
    if present and not overwrite:
        told = present[0].relative_to(output)
        raise InputError(
            f"--output: {output} holds a run already ({told}); allowed: --resume, --overwrite, or another folder"
        )
    return present


def inputs_of(config: Config, given: str | None) -> list[tuple[str, Path]]:
    """What a run reads: the configuration file that was given, and all settings that name a file or folder."""
    named = [(key, Path(value).expanduser()) for key, value in _texts(config.model_dump())]
    files = [("the configuration", Path(given))] if given else []
    return files + [(key, path) for key, path in named if _exists(path)]


def mark(folder: Path, kind: Kind, files: Iterable[str] = ()) -> None:
    """Say in ``folder`` that an output of ``kind`` wrote into it, and which files beside those of earlier times."""
    names = sorted({*files, *(marked(folder, kind) or ())})
    write_atomic(
        mark_of(folder, kind), (json.dumps({"written by": f"fedprompt {kind}", "files": names}) + "\n").encode()
    )


def mark_of(folder: Path, kind: Kind) -> Path:
    """The file that says so."""
    return folder / f".fedprompt-{kind}"


def marked(folder: Path, kind: Kind) -> set[str] | None:
    """The files that an output of ``kind`` wrote into ``folder``; None where none did."""
    try:
        return {str(name) for name in json.loads(mark_of(folder, kind).read_bytes())["files"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{mark_of(folder, kind)}: damaged; it says which files fedprompt wrote; allowed: another folder"
        ) from None


def present(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The names in ``folder`` that match one of the patterns."""
    return [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]


def check_free(folder: Path, kind: Kind, patterns: Iterable[str]) -> None:
    """Raise InputError where ``folder`` has files of these names that no output of ``kind`` wrote."""
    own = marked(folder, kind) or set()
    for name in present(folder, patterns):
        if name not in own:
            raise InputError(
                f"--output: {folder / name} was not written by fedprompt {kind}, which has a file of that name; "
                "allowed: another folder"
            )


def holds_a_run(output: Path) -> bool:
    """Whether a run wrote into ``output``: by its mark or, for one of an earlier version, by all that it leaves."""
    if marked(output, "run") is not None:
        return True
    return is_complete(output / "config.yaml") and (output / "metrics.jsonl").exists()


def is_complete(path: Path) -> bool:
    """Whether a configuration file has all sections, as a run writes it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    lines = text.splitlines()
    return all(any(line.startswith(f"{section}:") for line in lines) for section in Config.model_fields)


def _texts(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All texts among nested settings, under dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _texts(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield from ((f"{prefix}{key}", item) for item in value if isinstance(item, str))
        elif isinstance(value, str):
            yield f"{prefix}{key}", value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no path at all
        return False


def _is_in(file: Path, given: Path, output: Path) -> bool:
    """Whether ``file`` is the given file, or lies in the given folder where that is a part of ``output``."""
    if not given.is_dir():
        return _exists(given) and file.samefile(given)
    folder = given.resolve()
    return (
        folder != output.resolve()
        and folder.is_relative_to(output.resolve())
        and (file.resolve().is_relative_to(folder))
    )
