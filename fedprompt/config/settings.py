"""From what a user writes, dotted keys and nested values, to a checked object; what is wrong comes out in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedprompt.config.yaml_text import NotRead, parse_value
from fedprompt.errors import LONGEST_VALUE, InputError, did_you_mean, shown
from fedprompt.texts import printable

Model = TypeVar("Model", bound=BaseModel)
# From the name of an unknown key and those that are allowed beside it: what may have been meant, or an empty string
Hint = Callable[[str, list[str]], str]

_IN_WORDS = {  # what is allowed, by the first word of pydantic's type of error
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text (in quotes if it looks like something else)",
    "tuple": "a list in brackets",
    "too": "a shorter list",
    "missing": "a value here, it has no default",
}


def checked(model: type[Model], tree: dict[str, Any], section: str = "", hint: Hint = did_you_mean) -> Model:
    """Return ``tree`` as a ``model``. Raises InputError with one line about the first thing that is wrong.

    ``hint`` says what may be meant by an unknown key.
    """
    try:
        validated = model.model_validate(tree)
    except ValidationError as error:
        raise InputError(_explain(error, model, section, hint)) from None
    _refuse_converted_booleans(tree, validated, section)
    _refuse_infinity(validated, section)
    return validated


def _refuse_infinity(validated: BaseModel, section: str) -> None:
    """Raise InputError for a number that is not finite, which a class of another package may let through."""
    for name, value in validated:
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{section}.{name}: found {value}; allowed: a finite number")


def _refuse_converted_booleans(tree: dict[str, Any], validated: BaseModel, section: str) -> None:
    """Raise InputError where pydantic took ``true`` for a number, or a number or text such as ``yes`` for ``true``."""
    own = {name: getattr(validated, name) for name in type(validated).model_fields}
    values = {**(validated.model_extra or {}), **own}
    for name, given in tree.items():
        key, taken = f"{section}.{name}" if section else name, values[name]
        if isinstance(given, dict) and isinstance(taken, BaseModel):
            _refuse_converted_booleans(given, taken, key)
        elif isinstance(given, bool) != isinstance(taken, bool):
            raise InputError(f"{key}: found {shown(given)}; allowed: {_IN_WORDS[type(taken).__name__]}")


def apply(tree: dict[str, Any], override: str) -> str:
    """Set one ``key.path=value`` in nested settings and return its key.

    A value is a number, true, false, null or a text as in a YAML file, or a list or mapping in brackets.
    """
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")) or not key.isprintable():
        raise InputError(
            f"{shown(override)}: not an override; allowed: key.path=value, for example partition.alpha=0.1"
        )
    try:
        put(tree, key, parse_value(text))
    except NotRead as error:
        raise InputError(f"{key}: {shown(text)} is {error}") from None
    return key


def put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested settings. Raises InputError where a part of the key holds a value."""
    *parts, last = key.split(".")
    for part in parts:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise InputError(f"{key}: '{part}' holds the value {shown(below)}, so nothing can be set below it")
        tree = below
    tree[last] = value


def _explain(error: ValidationError, model: type[BaseModel], section: str, hint: Hint) -> str:
    """Put the first thing that pydantic found wrong into one line, and say how many more there are."""
    details = error.errors(include_url=False)
    first, more = details[0], len(details) - 1
    path = [str(part) for part in first["loc"]]
    key = ".".join(map(_name, [section, *path] if section else path))
    found = shown(first["input"])
    if first["type"] in ("extra_forbidden", "invalid_key"):
        allowed = _names_in(model, path[:-1], section)
        line = f"{key}: unknown key{hint(path[-1], allowed)}; allowed here: {', '.join(allowed)}"
    elif first["type"] == "model_type":  # something else where keys should be
        line = f"{key}: found {found}; allowed: keys below it ({', '.join(_names_in(model, path, section))})"
    else:
        line = f"{key}: found {found}{_nearest(first)}; allowed: {_allowed(first)}"
    return line + (f" (and {more} more wrong {'key' if more == 1 else 'keys'})" if more else "")


def _name(part: str) -> str:
    """A part of a key, cut where it is long."""
    return printable(part, LONGEST_VALUE)


def _nearest(detail: Any) -> str:
    """The nearest of the allowed words, where only certain words are allowed."""
    expected = detail["ctx"]["expected"] if detail["type"] == "literal_error" else ""
    return did_you_mean(str(detail["input"]), re.findall(r"'(.+?)'", expected))


def _allowed(detail: Any) -> str:
    """What pydantic says is allowed, in the words of someone who writes YAML."""
    words = _IN_WORDS.get(detail["type"].partition("_")[0])
    return words or detail["msg"].removeprefix("Input should be ")


def _names_in(model: type[BaseModel], path: list[str], section: str) -> list[str]:
    """Names of the keys that are allowed below ``path``."""
    for part in path:
        if part in model.model_fields:  # else an index of a list
            model = _model_in(model.model_fields[part].annotation) or model
    return [*(["name"] if section else []), *model.model_fields]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type is, or has in it, as ``Section | None`` does."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)
