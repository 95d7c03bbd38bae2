"""A client's (or a test shard's) samples, with everything that the frozen backbone can say about them beforehand.

Inputs stay as they are (images uint8 at their native size). Query features, and the tokens before the lowest block that a trained tensor
touches, depend on nothing that is trained, so they are computed once per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from fedprompt.data.images import Images
from fedprompt.models.model import PromptedModel

CHUNK = 64  # images per forward pass while features are prepared; fixed, so that they never depend on who asks


@dataclass(frozen=True)
class Examples:
    """Arrays of one length n; what is None was not computed, or is not needed once the rest is there."""

    labels: np.ndarray  # int64 [n]
    domains: np.ndarray  # int64 [n]
    images: Images | None  # uint8 [n, H, W, channels]
    tokens: np.ndarray | None = None  # float32 [n, T, D] before block `kind.layer`
    query: np.ndarray | None = None  # float32 [n, D]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """Return the samples at ``indices``, copied."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return Examples(**{name: None if a is None else a[indices] for name, a in arrays.items()})

    @staticmethod
    def concatenate(parts: Sequence[Examples]) -> Examples:
        """Put several examples one after the other; a field is None where any part lacks it.

        Raises ValueError where parts hold different things, so that together they would hold neither images nor tokens.
        """
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Examples)}
        joined = Examples(**{name: _joined(arrays) for name, arrays in columns.items()})
        held = any(part.images is not None or part.tokens is not None for part in parts)
        if held and joined.images is None and joined.tokens is None:
            raise ValueError("some parts hold only images and others only tokens: they cannot be one batch")
        return joined


def _joined(arrays: list) -> np.ndarray | None:
    return None if any(array is None for array in arrays) else np.concatenate(arrays)


def has_tokens_to_keep(model: PromptedModel) -> bool:
    """Whether some blocks run before anything trained: only then are tokens worth keeping (at block 0 they are not)."""
    return 0 < model.kind.layer < model.backbone.depth


def token_bytes(model: PromptedModel) -> int:
    """Bytes that the kept tokens of one image take."""
    return model.backbone.tokens_per_image * model.backbone.width * 4 if has_tokens_to_keep(model) else 0


def writable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy of one that is read-only (a view of shared memory), as torch demands."""
    return array if array.flags.writeable else array.copy()


@torch.no_grad()
def prepare(model: PromptedModel, examples: Examples, keep_tokens: bool) -> Examples:
    """Compute what the kind needs of the frozen backbone, once.

    ``keep_tokens`` says whether there is room for the tokens before block ``kind.layer``; where they are kept, or where
    no block runs in training at all, the images are let go.
    """
    backbone, kind = model.backbone, model.kind
    keep_tokens = keep_tokens and has_tokens_to_keep(model)
    if not (keep_tokens or kind.needs_query):
        return examples
    tokens, queries = [], []
    for start in range(0, len(examples), CHUNK):
        chunk = torch.from_numpy(writable(examples.images[start : start + CHUNK]))
        x = backbone.run(backbone.embed(chunk), 0, min(kind.layer, backbone.depth - 1) if keep_tokens else 0)
        if keep_tokens:
            tokens.append(x.float().cpu().numpy())
        if kind.needs_query:
            queries.append(backbone.class_feature(x, kind.layer if keep_tokens else 0))
    images_needed = not keep_tokens and kind.layer < backbone.depth
    return Examples(
        labels=examples.labels,
        domains=examples.domains,
        images=examples.images if images_needed else None,
        tokens=np.concatenate(tokens) if tokens else None,
        query=torch.cat(queries).cpu().numpy() if queries else None,
    )
