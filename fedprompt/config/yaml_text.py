"""YAML as fedprompt reads and writes it: plain data, in which one text has one meaning everywhere.

Scalars mean what the core schema of YAML 1.2 says: ``yes`` and ``1:30`` are texts, ``1e-3`` and ``010`` are numbers.
Refused are tags, merge keys, duplicate keys, keys that are lists, cycles, several documents, and whatever is larger
than settings can be. The tree is built from PyYAML's events without recursion: nothing is constructed that is not
listed here, and the limits hold before anything grows.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from fedprompt.errors import InputError, shown
from fedprompt.files import read_regular

MAX_BYTES = 256 * 1024  # of a file
MAX_DEPTH = 30  # of lists and mappings in each other
MAX_VALUES = 20_000  # with all aliases written out
MAX_DIGITS = 400  # of a whole number; the largest float has 309
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_OPENING = {"[": list, "{": dict, '"': str, "'": str}  # what an override may begin with that is no plain scalar


class Mark(Protocol):
    """A place in a text, counted from 0."""

    line: int
    column: int


class NotRead(ValueError):
    """Text that is no YAML of ours. ``problem``: what is wrong; the error's own text says where, too."""

    def __init__(self, problem: str, mark: Mark | None = None) -> None:
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        super().__init__(f"{problem}{place}")
        self.problem = problem


def parse(text: str) -> Any:
    """Return the only document in ``text`` as dicts, lists, texts, numbers, booleans and None. Raises NotRead."""
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            builder.add(event)
    except yaml.MarkedYAMLError as error:
        raise NotRead(error.problem or error.context or "not understood", error.problem_mark) from None
    except NotRead:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # characters and escapes that YAML does not allow
        raise NotRead(" ".join(str(error).split())) from None
    return builder.root


def parse_value(text: str) -> Any:
    """Return the value of a ``key=text`` override. Raises NotRead.

    What begins with a bracket or a quote is YAML; all else is one scalar, in which ``#`` and ``: `` are no syntax.
    """
    text = text.strip()
    _check_characters(text)
    if not text:
        raise NotRead("no value; allowed: a value, null for what may be left out, or '' in quotes for an empty text")
    if text[0] not in _OPENING:
        return scalar(text)
    try:
        elements = parse(f"[{text}]")  # a comment behind the value would hide the bracket
    except NotRead as error:
        raise NotRead(f"not valid YAML ({error.problem}); a text that begins so needs quotes") from None
    if len(elements) != 1 or not isinstance(elements[0], _OPENING[text[0]]):
        raise NotRead("more than one value; a text that begins so needs quotes")
    return elements[0]


def scalar(text: str) -> Any:
    """What an unquoted scalar means in YAML's core schema. Raises NotRead for whole numbers beyond ``MAX_DIGITS``."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise NotRead(f"a whole number of {len(text)} digits; allowed: {MAX_DIGITS} at most")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def read(path: Path, what: str) -> Any:
    """Return the content of a YAML file, ``what`` it is called in messages. Raises InputError that names the file."""
    content = read_regular(path, most=MAX_BYTES)
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot read the {what} ({error}); allowed: text in UTF-8") from None
    except NotRead as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None


def dump(tree: Any) -> str:
    """Write plain data so that ``parse`` reads it back to an equal object."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Done(NamedTuple):
    """A value that has been read whole."""

    value: Any
    size: int  # values in it, itself included
    height: int  # lists and mappings in each other


class _Builder:
    """Makes a tree of a document's events."""

    def __init__(self) -> None:
        self.root: Any = None
        self._documents = self._values = 0
        self._open: list[_Collection] = []
        self._anchors: dict[str, _Done] = {}  # an anchor is not there before its value ends: so there are no cycles

    def add(self, event: yaml.Event) -> None:
        """Take the next event. Raises NotRead for what is not allowed."""
        mark: Any = event.start_mark
        if (tag := getattr(event, "tag", None)) is not None:
            raise NotRead(f"the tag {shown(tag)}; allowed: values without tags", mark)
        match event:
            case yaml.DocumentStartEvent():
                self._documents += 1
                if self._documents > 1:
                    raise NotRead("a second document; allowed: one", mark)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._grow(size=1, height=1, mark=mark)
                value: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
                self._open.append(_Collection(value, event.anchor, mark))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                closed = self._open.pop()
                self._put(_Done(closed.value, closed.size, closed.height), closed.anchor, closed.mark)
            case yaml.AliasEvent():
                if event.anchor not in self._anchors:
                    raise NotRead(f"the alias *{event.anchor} stands for nothing that ends before it", mark)
                done = self._anchors[event.anchor]
                self._grow(done.size, done.height, mark)
                self._put(done._replace(value=copy.deepcopy(done.value)), None, mark)
            case yaml.ScalarEvent():
                self._grow(size=1, height=0, mark=mark)
                _check_characters(event.value, mark)
                is_key = bool(self._open) and self._open[-1].expects_key
                self._put(_Done(event.value if is_key else _meaning(event), 1, 0), event.anchor, mark)

    def _grow(self, size: int, height: int, mark: Mark) -> None:
        self._values += size
        if self._values > MAX_VALUES:
            raise NotRead(f"more than {MAX_VALUES:,} values, with all aliases written out", mark)
        if len(self._open) + height > MAX_DEPTH:
            raise NotRead(f"more than {MAX_DEPTH} lists or mappings in each other", mark)

    def _put(self, done: _Done, anchor: str | None, mark: Mark) -> None:
        if anchor is not None:
            self._anchors[anchor] = done
        if self._open:
            self._open[-1].put(done, mark)
        else:
            self.root = done.value


class _Collection:
    """A list or a mapping whose end has not been read."""

    def __init__(self, value: dict[str, Any] | list[Any], anchor: str | None, mark: Mark) -> None:
        self.value, self.anchor, self.mark = value, anchor, mark
        self.size = self.height = 1
        self._key: str | None = None

    @property
    def expects_key(self) -> bool:
        """Whether the next element is a key, which is a text whatever it looks like."""
        return isinstance(self.value, dict) and self._key is None

    def put(self, done: _Done, mark: Mark) -> None:
        """Add an element; to a mapping, keys and values in turn."""
        self.size += done.size
        self.height = max(self.height, done.height + 1)
        if isinstance(self.value, list):
            self.value.append(done.value)
        elif self.expects_key:
            self._key = self._checked_key(done.value, mark)
        elif self._key is not None:
            self.value[self._key] = done.value
            self._key = None

    def _checked_key(self, key: Any, mark: Mark) -> str:
        if not isinstance(key, str):
            raise NotRead(f"the key {shown(key)} is no text; allowed: names", mark)
        if key == "<<":
            raise NotRead("the merge key <<, which YAML 1.2 does not have; allowed: keys written out", mark)
        if key in self.value:
            raise NotRead(f"the key {shown(key)} is there twice; allowed: once", mark)
        return key


def _check_characters(text: str, mark: Mark | None = None) -> None:
    """Refuse what no file can hold: halves of characters, such as a command line makes of bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotRead("text with bytes or escapes that are no characters; allowed: Unicode", mark) from None


def _meaning(event: yaml.ScalarEvent) -> Any:
    mark: Any = event.start_mark
    if event.style is not None:  # in quotes, or a block
        return event.value
    try:
        return scalar(event.value)
    except NotRead as error:
        raise NotRead(error.problem, mark) from None


class _Dumper(yaml.SafeDumper):
    """Puts texts into quotes that ``parse``, or another program's YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out wherever it is."""
        return True


for _pattern, _tag in ((_INT, "int"), (_FLOAT, "float"), (_INFINITE, "float"), (_NULL, "null"), (_BOOL, "bool")):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)
