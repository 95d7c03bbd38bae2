"""The one way by which fedprompt gets timm.

timm imports torchvision, and of that needs only the Python half. A CPU build of torch next to the ordinary torchvision
wheel (built for CUDA) cannot load the compiled half, and then ``import torchvision`` dies while it describes operators
that do not exist. ``import_timm`` lets it leave out just those descriptions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


def import_timm() -> ModuleType:
    """Return the module ``timm``, also where torchvision's compiled operators do not match the installed torch.

    Where the plain import works nothing is patched. Any failure but the one above is raised as it is.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if not _is_missing_operator(error):
            raise
    _forget("torchvision", "timm")  # submodules of the failed import are still half there
    with _without_torchvision_fakes():
        return importlib.import_module("timm")


def _is_missing_operator(error: RuntimeError) -> bool:
    return "operator torchvision::" in str(error) and "does not exist" in str(error)


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


@contextmanager
def _without_torchvision_fakes() -> Iterator[None]:
    """Let ``torch.library.register_fake`` pass over torchvision's operators, and put it back afterwards."""
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Callable:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return args[0] if args else lambda function: function
        return original(op, *args, **kwargs)

    torch.library.register_fake = register_fake
    try:
        yield
    finally:
        torch.library.register_fake = original
