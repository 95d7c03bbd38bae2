"""Names of what a user may replace: one registry per type, filled by our modules and by other packages.

A package names its modules, or the things in them, under the entry points ``fedprompt.algorithms``,
``fedprompt.local_rules`` and so on (``TYPES``). Plugins are loaded here, once per process, before a registry answers.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, Generic, TypeVar

from fedprompt.errors import InputError, did_you_mean, shown

# The types, with the module that makes the registry of each. A type stands behind those that it may name: methods name
# kinds and local rules.
TYPES = {
    "backbones": "fedprompt.models.backbones.registry",
    "datasets": "fedprompt.data.registry",
    "heads": "fedprompt.models.heads.registry",
    "partitions": "fedprompt.data.partitions.registry",
    "trackers": "fedprompt.tracking.registry",
    "local_rules": "fedprompt.client.rules.registry",
    "kinds": "fedprompt.models.kinds.registry",
    "algorithms": "fedprompt.algorithms.registry",
}
OURS = "fedprompt."  # how the names of our modules, and of the groups of entry points, begin
_NAME = re.compile(r"[\w.-]+")

T = TypeVar("T")


@dataclass(frozen=True)
class Registered(Generic[T]):
    """What a registry knows of a thing. A type that must know more derives from this."""

    name: str
    about: str  # one line
    source: str  # where it is from, such as a paper; one line, or an empty text
    thing: T  # the class or function that was decorated

    @property
    def place(self) -> str:
        """The module and name of the class or function."""
        return f"{_module(self.thing)}.{getattr(self.thing, '__qualname__', '')}"

    @property
    def is_ours(self) -> bool:
        """Whether it comes with fedprompt, and not from another package or a notebook."""
        return _module(self.thing).startswith(OURS)


R = TypeVar("R", bound=Registered[Any])


class Registry(Generic[R]):
    """Everything of one type, by name.

    Args:
        type: one of ``TYPES``.
        noun: what one of them is called in a message.
        key: the configuration's key whose value is such a name.
        package: the package whose modules register what comes with fedprompt.
        check: raises InputError where an entry of another package names things that do not exist.
    """

    def __init__(
        self, type: str, *, noun: str, key: str, package: str, check: Callable[[R], None] = lambda entry: None
    ) -> None:
        self.type, self.noun, self.key, self.check = type, noun, key, check
        self.decorator = f"@{type.removesuffix('s')}"
        self._package, self._is_complete = package, False
        self._entries: dict[str, R] = {}
        _REGISTRIES[type] = self

    def add(self, entry: R) -> None:
        """Register an entry, which may replace one of the same module and qualified name (a notebook's cell).

        Raises InputError where the name, a line about it or the thing cannot be used, or where the name is taken.
        """
        self._check_texts(entry)
        before = self._entries.get(entry.name, entry)
        if before.place != entry.place:
            raise InputError(
                f"{self.key}: '{entry.name}' is registered twice, by {before.place} and by {entry.place}; "
                f"allowed: one {self.noun} of a name; rename one, or uninstall its package"
            )
        self._entries[entry.name] = entry

    def get(self, name: str | None) -> R:
        """Return what is called ``name``; raises InputError that lists the names there are, and what is broken."""
        self._complete()
        if name is None or name not in self._entries:
            raise InputError(
                f"{self.key}: unknown {self.noun} {shown(name)}{did_you_mean(str(name), self._entries)}; "
                f"allowed: {', '.join(sorted(self._entries))}{why_missing()}"
            )
        return self._entries[name]

    def find(self, name: str) -> R | None:
        """Return what is called ``name``, or None."""
        self._complete()
        return self._entries.get(name)

    def available(self) -> list[R]:
        """All entries, by name."""
        self._complete()
        return [self._entries[name] for name in sorted(self._entries)]

    def names(self) -> list[str]:
        """All names, sorted."""
        return [entry.name for entry in self.available()]

    def load_ours(self) -> None:
        """Import the modules that register what comes with fedprompt, once."""
        if not self._is_complete:
            self._is_complete = True
            package = importlib.import_module(self._package)
            for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)

    def _complete(self) -> None:
        with _LOCK:
            self.load_ours()
            _load_plugins()

    def _check_texts(self, entry: R) -> None:
        if not callable(entry.thing) or not hasattr(entry.thing, "__qualname__"):
            raise InputError(f"{self.decorator}: found {shown(entry.thing)}; allowed: a class or a function")
        if not isinstance(entry.name, str) or not _NAME.fullmatch(entry.name):
            raise InputError(
                f"{self.decorator}: {entry.place} has the name {shown(entry.name)}; "
                "allowed: letters, digits, '-', '_', '.'"
            )
        for what, line in (("line about it", entry.about), ("source", entry.source)):
            if not isinstance(line, str) or len(line.splitlines()) > 1:
                raise InputError(
                    f"{self.decorator}: '{entry.name}' has the {what} {shown(line)}; allowed: a text of one line"
                )


class AnyOf(Sequence[str]):
    """Names of all entries of a type that fit, other packages' included, looked up whenever they are asked for.

    ``first`` is the first of them, a default.
    """

    def __init__(self, type: str, first: str, fits: Callable[[Any], bool] = lambda entry: True) -> None:
        self._type, self._first, self._fits = type, first, fits

    def _names(self) -> list[str]:
        names = [entry.name for entry in registry_of(self._type).available() if self._fits(entry)]
        return sorted(names, key=lambda name: name != self._first)

    def __getitem__(self, index: Any) -> Any:
        return self._names()[index]

    def __len__(self) -> int:
        return len(self._names())


@dataclass
class _Plugins:
    """What has become of other packages in this process."""

    are_loaded: bool = False
    broken: list[str] = field(default_factory=list)  # a line per package that cannot be used
    told: list[str] = field(default_factory=list)  # those lines that the user has been told


_REGISTRIES: dict[str, Registry[Any]] = {}
_PLUGINS = _Plugins()
_LOCK = threading.RLock()


def registry_of(type: str) -> Registry[Any]:
    """Return the registry of a type, one of ``TYPES``."""
    importlib.import_module(TYPES[type])
    return _REGISTRIES[type]


def tell_broken() -> None:
    """Say once, a line each on standard error, which packages are broken and left out.

    Whoever reads a configuration or lists names calls it; workers do not, so that a run says it once.
    """
    _load_plugins()
    for line in _PLUGINS.broken:
        if line not in _PLUGINS.told:
            print(f"fedprompt: {line}; going on without it, repair the package or uninstall it", file=sys.stderr)
            _PLUGINS.told.append(line)


def why_missing() -> str:
    """Return the end of a message about a name that is not there: the packages that could not be loaded."""
    return "".join(f"; {line}" for line in _PLUGINS.broken)


def snapshot() -> dict[str, dict[str, Any]]:
    """Return the entries of all registries, for ``restore``."""
    return {type: dict(registry._entries) for type, registry in _REGISTRIES.items()}


def restore(before: dict[str, dict[str, Any]]) -> None:
    """Let all registries hold what they held at a snapshot.

    Modules of what goes are forgotten: another package that names one of them registers its things again.
    """
    for type, registry in _REGISTRIES.items():
        for name, entry in registry._entries.items():
            if before[type].get(name) is not entry and not entry.is_ours:
                sys.modules.pop(_module(entry.thing), None)
        registry._entries = dict(before[type])


def _load_plugins() -> None:
    """Load the packages that name something under our entry points, once; a module that asks meanwhile gets what is."""
    with _LOCK:
        if _PLUGINS.are_loaded:
            return
        _PLUGINS.are_loaded = True
        groups = [f"[{OURS}{type}]" for type in TYPES]
        packages = [
            found
            for found in distributions()
            if (text := found.read_text("entry_points.txt")) and any(group in text for group in groups)
        ]
        if packages:  # so that it is the other package whose name is taken
            for type in TYPES:
                registry_of(type).load_ours()
        for package in {found.name: found for found in reversed(packages)}.values():  # the first of a name
            _load_package(package)


def _load_package(package: Distribution) -> None:
    """Load everything that a package names under our entry points; one that is broken is noted and brings nothing."""
    try:
        entries = [entry for type in TYPES for entry in package.entry_points.select(group=OURS + type)]
    except Exception as error:  # of a file with other lines than entry points
        _PLUGINS.broken.append(f"entry points of package '{package.name}' cannot be read: {_reason(error)}")
        return
    before = snapshot()
    for entry in entries:
        try:
            _load_entry(entry)
        except (Exception, SystemExit) as error:
            restore(before)
            _PLUGINS.broken.append(
                f"entry point '{entry.name} = {entry.value}' of package '{package.name}' cannot be loaded: "
                f"{_reason(error)}"
            )
            return


def _load_entry(entry: EntryPoint) -> None:
    """Import what an entry point names, a module or a registered thing, and check what that has registered."""
    before = snapshot()
    found = entry.load()
    entries = [known for registry in _REGISTRIES.values() for known in registry._entries.values()]
    if entry.attr and not any(found is known.thing for known in entries):
        decorators = ", ".join(sorted(registry.decorator for registry in _REGISTRIES.values()))
        raise InputError(f"found {shown(found)}; allowed: a module, or what {decorators} has registered there")
    for type, registry in _REGISTRIES.items():
        for name, known in registry._entries.items():
            if before[type].get(name) is not known:
                registry.check(known)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _module(thing: Any) -> str:
    return getattr(thing, "__module__", None) or ""
