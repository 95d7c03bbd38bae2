"""The tiny experiment as Python gives it: a dict with dotted keys."""

from tiny import TINY


def settings(*overrides):
    """The tiny experiment as a dict with dotted keys; later overrides win."""
    pairs = (override.split("=", 1) for override in (*TINY, *overrides))
    return {key: _value(text) for key, text in pairs}


def _value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text, text)
