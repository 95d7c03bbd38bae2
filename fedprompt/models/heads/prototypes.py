"""Classes without a trained head: a prototype per class, scored by its cosine with what the head reads."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.files import open_regular
from fedprompt.models.batch import Batch
from fedprompt.models.heads.classifier import Head
from fedprompt.models.heads.registry import head
from fedprompt.models.params import Params

SUFFIXES = (".npy", ".safetensors")
_SHORTEST = 1e-12  # rows below this length are not brought to length 1 (torch's normalize)


@head(
    "prototypes",
    "nothing to train: head.scale times cosines with a prototype per class, from head.embeddings or public images",
    source="Snell et al., NeurIPS 2017",
)
class Prototypes(Head):
    """Scores by the cosine with each class's prototype."""

    is_trained = False
    wants_prototypes = True

    def scores(self, params: Params, features: Tensor, batch: Batch) -> Tensor:
        assert self.prototypes is not None
        return prototype_scores(features, self.prototypes, self.options.scale)


def prototype_scores(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """Class scores [M, K]: ``scale`` times the cosines of features [M, D] with prototypes [K, D]."""
    return scale * F.normalize(features, dim=-1) @ F.normalize(prototypes.to(features.device), dim=-1).T


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Prototypes [K, D]: each class's mean of its features [n, D], brought to length 1 before (Snell et al. 2017)."""
    member = F.one_hot(labels, classes).to(features)  # [n, K]
    return member.T @ F.normalize(features, dim=-1) / member.sum(0)[:, None]


class _Unfit(Exception):
    """Why a file holds no embeddings, as the middle of a line."""


def read_embeddings(path: str, classes: int, width: int, hint: str = "") -> Tensor:
    """Read class embeddings [K, D], in the order of the classes, from a .npy file or the one tensor of a .safetensors.

    The header is compared with K and D before any number is read. Raises InputError with one line that names the file,
    and ends with ``hint``.
    """
    shape = f"{classes} x {width} finite numbers (classes x width of what the head reads{hint})"
    if not path.endswith(SUFFIXES):
        raise InputError(f"head.embeddings: found '{path}'; allowed: a file that ends in {' or '.join(SUFFIXES)}")
    try:
        with open_regular(path) as file:
            read = _read_npy if path.endswith(".npy") else _read_safetensors
            return _checked(read(file, Path(path), (classes, width)))
    except _Unfit as error:
        raise InputError(f"head.embeddings: {path} holds {error}; allowed: {shape}") from None
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
    except Exception as error:  # what damaged headers make the readers stumble over
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__
    raise InputError(f"head.embeddings: cannot read {path} ({reason}); allowed: {shape}")


def _read_npy(file: BinaryIO, path: Path, wanted: tuple[int, int]) -> Tensor:
    start = file.read(2)
    file.seek(0)
    if start == b"PK":
        raise _Unfit("a zip archive (.npz)")
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    _check(shape, str(dtype), wanted, dtype.kind in "fiu")
    file.seek(0)
    array = np.lib.format.read_array(file, allow_pickle=False)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        return torch.from_numpy(array.astype(np.float32))


def _read_safetensors(file: BinaryIO, path: Path, wanted: tuple[int, int]) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
        if len(names) != 1:
            raise ValueError(f"{len(names)} tensors in place of one")
        found = tensors.get_slice(names[0])
        kind = str(found.get_dtype())
        _check(found.get_shape(), kind, wanted, kind.startswith(("F", "BF", "I", "U")))
        return tensors.get_tensor(names[0]).to(torch.float32)


def _check(shape: tuple[int, ...] | list[int], dtype: str, wanted: tuple[int, int], is_real: bool) -> None:
    if tuple(shape) != wanted or not is_real:
        raise _Unfit(f"{dtype} {' x '.join(map(str, shape)) or '(one number)'}")


def _checked(rows: Tensor) -> Tensor:
    """Refuse rows [K, D] that have no direction in float32: not finite, of length 0, or of a length beyond float32."""
    bad = ~torch.isfinite(rows).all(dim=1)
    if bad.any():
        raise _Unfit(f"numbers in row {int(bad.nonzero()[0])} that are not finite in float32")
    lengths = rows.norm(dim=1)
    bad = ~((lengths > _SHORTEST) & torch.isfinite(lengths))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise _Unfit(f"row {row} of length {lengths[row]:g}, which has no direction in float32")
    return rows
