"""Files of weights: read within a limit of size, and without executing anything in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedprompt.errors import InputError, did_you_mean
from fedprompt.files import open_regular
from fedprompt.models.weights.torch_files import load_plain

SOURCES = ("offline", "hub", "random")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_weights(weights: str, *, most: int) -> dict[str, Tensor]:
    """Return the state dict in a file that ``backbone.weights`` names, of at most ``most`` bytes."""
    path = Path(os.path.expanduser(weights))
    if path.suffix not in SUFFIXES or not path.exists():
        found = "no such file" if path.suffix in SUFFIXES else "no known source"
        raise InputError(
            f"backbone.weights: '{weights}' is {found}{did_you_mean(weights, SOURCES)}; "
            f"allowed: {', '.join(SOURCES)} or an existing {', '.join(SUFFIXES)} file"
        )
    with open_regular(path, "backbone.weights") as file:
        size = file.seek(0, 2)
        if size > most:
            raise InputError(
                f"backbone.weights: {weights} holds {size:,} bytes; allowed for this backbone: at most {most:,}"
            )
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(file, path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"backbone.weights: {path} is not a whole safetensors file ({error})") from error


def _read_pickle(file: BinaryIO, path: Path) -> dict[str, Tensor]:
    try:
        loaded = load_plain(file)
    except InputError:
        raise
    except Exception as error:  # torch raises many types for truncated files and for pickles that want to run code
        raise InputError(
            f"backbone.weights: {path} is damaged or holds more than plain tensors, which is not unpickled; "
            "allowed: what torch.save(model.state_dict(), PATH) writes, or .safetensors"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"backbone.weights: {path} holds no state dict (names to tensors)")
    return dict(loaded)
