"""A client's (or a test shard's) samples, with everything that the frozen backbone can say about them beforehand.

Inputs stay as they are, images uint8 at their native size. Query features, and the tokens before the lowest block that
a trained tensor touches, depend on nothing that is trained, so they are computed once per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from fedprompt.data.inputs import Inputs, gathered
from fedprompt.models.backbones.base import InputTensors
from fedprompt.models.model import PromptedModel

CHUNK = 64  # samples per forward pass while features are prepared; fixed, so that they never depend on who asks


@dataclass(frozen=True)
class Examples:
    """InputTensors of one length n; what is None was not computed, or is not needed once the rest is there."""

    labels: np.ndarray  # int64 [n]
    domains: np.ndarray  # int64 [n]
    inputs: Inputs | None
    tokens: np.ndarray | None = None  # float32 [n, T, D] before block `kind.layer`
    token_mask: np.ndarray | None = None  # bool [n, T], False for padding; None: nothing is padded
    query: np.ndarray | None = None  # float32 [n, D]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """Return the samples at ``indices``, all but the inputs copied."""
        there = {f.name: array for f in fields(self) if (array := getattr(self, f.name)) is not None}
        return replace(self, **{name: array[indices] for name, array in there.items()})

    @staticmethod
    def concatenate(parts: Sequence[Examples]) -> Examples:
        """Put several examples one after the other; a field is None where any part lacks it.

        Raises ValueError where parts hold different things, so that together they would hold neither images nor tokens.
        """
        inputs = [part.inputs for part in parts if part.inputs is not None]
        tokens, mask = _joined_tokens([part.tokens for part in parts], [part.token_mask for part in parts])
        joined = Examples(
            labels=np.concatenate([part.labels for part in parts]),
            domains=np.concatenate([part.domains for part in parts]),
            inputs=gathered(inputs, np.arange(sum(map(len, inputs)))) if len(inputs) == len(parts) else None,
            tokens=tokens,
            token_mask=mask,
            query=_joined([part.query for part in parts]),
        )
        held = any(part.inputs is not None or part.tokens is not None for part in parts)
        if held and joined.inputs is None and joined.tokens is None:
            raise ValueError("some parts hold only inputs and others only tokens: they cannot be one batch")
        return joined


def _joined(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if len(there) == len(arrays) else None


def _joined_tokens(
    tokens: Sequence[np.ndarray | None], masks: Sequence[np.ndarray | None]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Put tokens [n, T, D] one after the other, with their masks; shorter ones are padded at the end."""
    there = [part for part in tokens if part is not None]
    if len(there) < len(tokens):
        return None, None
    longest = max(part.shape[1] for part in there)
    if all(mask is None for mask in masks):
        return np.concatenate(there), None
    joined, mask = [], []
    for part, real in zip(there, masks, strict=True):
        real = np.ones(part.shape[:2], dtype=bool) if real is None else real
        more = longest - part.shape[1]
        joined.append(np.pad(part, ((0, 0), (0, more), (0, 0))))
        mask.append(np.pad(real, ((0, 0), (0, more))))
    return np.concatenate(joined), np.concatenate(mask)


def has_tokens_to_keep(model: PromptedModel) -> bool:
    """Whether some blocks run before anything trained: only then are tokens worth keeping (at block 0 they are not)."""
    return 0 < model.kind.layer < model.backbone.depth


def token_bytes(model: PromptedModel) -> int:
    """Bytes that the kept tokens of one sample take, at most."""
    return model.backbone.tokens_per_sample * model.backbone.width * 4 if has_tokens_to_keep(model) else 0


def tensors(inputs: Inputs) -> InputTensors:
    """A batch of inputs as the backbone takes it, on the CPU."""
    return tuple(torch.from_numpy(writable(array)) for array in inputs.arrays())


def writable(array: np.ndarray) -> np.ndarray:
    """The array itself, or a copy of one that is read-only (a view of shared memory), as torch demands."""
    return array if array.flags.writeable else array.copy()


@torch.no_grad()
def prepare(model: PromptedModel, examples: Examples, keep_tokens: bool) -> Examples:
    """Compute what the kind needs of the frozen backbone, once.

    ``keep_tokens`` says whether there is room for the tokens before block ``kind.layer``; where they are kept, or where
    no block runs in training at all, the inputs are let go.
    """
    backbone, kind = model.backbone, model.kind
    keep_tokens = keep_tokens and has_tokens_to_keep(model)
    if examples.inputs is None or not (keep_tokens or kind.needs_query):
        return examples
    tokens: list[np.ndarray | None] = []
    masks: list[np.ndarray | None] = []
    queries: list[Tensor] = []
    for start in range(0, len(examples), CHUNK):
        chunk = tensors(examples.inputs[start : start + CHUNK])
        x = backbone.run(backbone.embed(chunk), 0, min(kind.layer, backbone.depth - 1) if keep_tokens else 0)
        if keep_tokens:
            tokens.append(x.values.float().cpu().numpy())
            masks.append(None if x.mask is None else x.mask.cpu().numpy())
        if kind.needs_query:
            queries.append(backbone.features_from(x, kind.layer if keep_tokens else 0))
    inputs_needed = not keep_tokens and kind.layer < backbone.depth
    kept, mask = _joined_tokens(tokens, masks) if tokens else (None, None)
    return Examples(
        labels=examples.labels,
        domains=examples.domains,
        inputs=examples.inputs if inputs_needed else None,
        tokens=kept,
        token_mask=mask,
        query=torch.cat(queries).cpu().numpy() if queries else None,
    )
