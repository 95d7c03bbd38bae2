"""Which module imports which, read from the source, and what the rules of the house say about it.

Every import counts: those inside functions, those for types only, and ``import_module("...")`` with a literal name.
Modules are named without the package, so ``fedprompt/data/images.py`` is ``data.images``; the package itself is ``""``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

# Rooms from the lowest to the highest. A module belongs to the longest entry that its name begins with, and may import
# its own level and those above it in this list.
LEVELS: tuple[tuple[str, ...], ...] = (
    (
        "allocation",
        "commands",
        "errors",
        "failure",
        "files",
        "interrupts",
        "outlets",
        "programs",
        "registry",
        "seeding",
        "texts",
        "wording",
    ),
    ("config.paths", "config.schema", "config.settings", "config.yaml_text"),
    ("data", "models"),
    ("blackbox",),
    ("client",),
    ("privacy",),
    ("algorithms",),
    ("tracking",),
    ("config",),
    ("runtime.checkpoints", "runtime.folders"),
    ("runtime",),
    ("runtime.ray", "runtime.serving"),
    ("personalization", "reports", "sweeps"),
    ("api", "listings"),
    ("",),  # fedprompt/__init__.py, which offers the names of the API
    ("terminal",),
    ("cli",),
    ("__main__",),
)
RAY_ROOMS = ("runtime.ray", "sweeps")
LARGEST_SHARE = 0.15  # of the package's lines, in one folder's own files
LARGE_FOLDERS = ("algorithms",)  # one file per method, however many there are


@dataclass(frozen=True)
class Import:
    """One import: ``target`` is a module of the package, or the name of another package behind a ``:``."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target or '__init__'}"


def modules(package: Path) -> dict[str, Path]:
    """Files of a package by the names of their modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def imports(package: Path) -> list[Import]:
    """Every import in a package's files, of its own modules and of other packages."""
    files = modules(package)
    return [
        Import(module, _target(name, package.name, files), line)
        for module, path in files.items()
        for name, line in _imported_names(path, package)
    ]


def against_direction(found: Iterable[Import]) -> list[str]:
    """Imports of a higher room, and modules that belong to no room."""
    own = [one for one in found if not one.target.startswith(":")]
    homeless = {name for one in own for name in (one.module, one.target) if _room(name) is None}
    placed = [one for one in own if not {one.module, one.target} & homeless]
    upwards = [str(one) for one in placed if _level(one.module) < _level(one.target)]
    return [f"{name}: has no room in LEVELS" for name in sorted(homeless)] + upwards


def module_circle(found: Iterable[Import]) -> list[str]:
    """The modules of one circle, empty where there is none."""
    return _circle((one.module, one.target) for one in found if not one.target.startswith(":"))


def room_circle(found: Iterable[Import]) -> list[str]:
    """The rooms of one circle, empty where there is none; imports within a room make none."""
    rooms = ((_room(one.module), _room(one.target)) for one in found if not one.target.startswith(":"))
    return _circle((room, other) for room, other in rooms if room != other)


def ray_elsewhere(found: Iterable[Import]) -> list[str]:
    """Imports of Ray outside the rooms that may."""
    return [str(one) for one in found if one.target == ":ray" and not _is_in(one.module, RAY_ROOMS)]


def shares(package: Path) -> dict[str, float]:
    """Each folder's share of a package's lines, its subfolders not counted."""
    lines: dict[str, int] = {}
    for path in modules(package).values():
        folder = path.parent.relative_to(package).as_posix()
        lines[folder] = lines.get(folder, 0) + len(path.read_text(encoding="utf-8").splitlines())
    total = sum(lines.values())
    return {folder: count / total for folder, count in lines.items()}


def too_large(package: Path) -> list[str]:
    """Folders with more than their share of the package's lines."""
    return [
        f"{folder}: {share:.1%} of all lines"
        for folder, share in shares(package).items()
        if share > LARGEST_SHARE and folder not in LARGE_FOLDERS
    ]


def _imported_names(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, with lines; for ``from a import b`` this is ``a.b``."""
    folder = ".".join([package.name, *path.parent.relative_to(package).parts])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), folder)
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _target(name: str, package: str, files: Mapping[str, Path]) -> str:
    """The module of the package that a dotted name is, or is in; ``:top`` for a name of another package."""
    top, _, inside = name.partition(".")
    if top != package:
        return f":{top}"
    while inside and inside not in files:
        inside = inside.rpartition(".")[0]
    return inside


def _is_in(module: str, rooms: Iterable[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def _room(module: str) -> str | None:
    rooms = (room for level in LEVELS for room in level)
    fitting = [room for room in rooms if module == room or (room and module.startswith(f"{room}."))]
    return max(fitting, key=len, default=None)


def _level(module: str) -> int:
    room = _room(module)
    return next(i for i, level in enumerate(LEVELS) if room in level)


def _circle(edges: Iterable[tuple[str | None, str | None]]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for start, end in edges:
        graph.setdefault(str(start), set()).add(str(end))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
