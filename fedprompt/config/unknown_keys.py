"""What to say about a key that is not where it was given: the places that have it, or one like it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from pydantic import BaseModel

from fedprompt import errors
from fedprompt.algorithms import registry
from fedprompt.algorithms.base import Algorithm
from fedprompt.errors import InputError

MOST = 3  # places that are named
METHODS = "algorithm"  # the section whose other keys are the method's own


class KeyOfAnotherMethod(InputError):
    """A key below ``algorithm`` that this method does not have, but ``methods`` do."""

    def __init__(self, line: str, methods: Sequence[str]) -> None:
        super().__init__(line)
        self.methods = tuple(methods)


def check_method_keys(algorithm: type[Algorithm], given: Sequence[str]) -> None:
    """Raise KeyOfAnotherMethod for the first key below ``algorithm`` that only other methods have."""
    own = algorithm.Settings.model_fields
    for key in given:
        owners = [method.name for method in registry.available() if key in method.Settings.model_fields]
        if owners and key not in own:
            raise KeyOfAnotherMethod(
                f"{METHODS}.{key}: not a key of '{algorithm.name}' but of {', '.join(owners)}; "
                f"allowed here: {', '.join(['name', *own])}",
                owners,
            )


def did_you_mean(name: str, beside: Sequence[str], model: type[BaseModel]) -> str:
    """Return `` (did you mean 'local.lr'?)`` for an unknown key of a ``model``, or an empty string.

    First come keys of that very name in any section, then one like it ``beside``, then one like it anywhere.
    """
    places: dict[str, list[str]] = {}
    for key in dict.fromkeys(_keys(model)):
        places.setdefault(key.rpartition(".")[2], []).append(key)
    near = [name] if name in places else get_close_matches(name, places, n=1, cutoff=0.8)
    meant = " or ".join(f"'{key}'" for one in near for key in places[one][:MOST])
    own = "" if name in places else errors.did_you_mean(name, beside)
    return own or (f" (did you mean {meant}?)" if meant else "")


def _keys(model: type[BaseModel]) -> Iterator[str]:
    """All keys with their sections, those of all methods included."""
    for section, field in model.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, BaseModel):
            yield from (f"{section}.{key}" for key in below.model_fields)
    for method in registry.available():
        yield from (f"{METHODS}.{key}" for key in method.Settings.model_fields)
