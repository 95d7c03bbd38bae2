"""Words for numbers, the same in every line that a user reads."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """``1 round``, ``2 rounds``, ``1,438 images``: a number with its noun, of which there is a regular plural."""
    return f"{number:,.0f} {noun}" if number == 1 else f"{number:,.0f} {noun}{_ending(noun)}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if not hours else f"{hours} h" + (f" {rest} min" if rest else "")


def _ending(noun: str) -> str:
    return "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
