"""Texts of the user's, such as names of classes, made fit for one line of a terminal, a table or a figure."""

from __future__ import annotations

import unicodedata

LONGEST = 40  # characters of a name that are shown
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # control, direction, surrogates, unassigned, line breaks


def printable(text: str, longest: int = LONGEST) -> str:
    """Return ``text`` on one line: invisible characters as escapes, an empty text as ``''``, a long one cut with …."""
    shown = "".join(escaped(c) if unicodedata.category(c) in _INVISIBLE else c for c in text) or "''"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def escaped(character: str) -> str:
    r"""Return a character as Python writes it without its own glyph, such as ``\n`` or ``\u732b``."""
    return character.encode("unicode_escape").decode("ascii")
