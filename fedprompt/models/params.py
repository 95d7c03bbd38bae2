"""What is trained and travels: ``Params``, a plain dict of named tensors, and the few things one does with it.

Stacked params have a leading client axis: {name: [C, ...]}. Names that start with ``head.`` belong to the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]

HEAD = "head."


def stack(items: Sequence[Params], device: torch.device | str | None = None) -> Params:
    """Stack C params of equal shapes to {name: [C, ...]}."""
    return {name: _stacked([params[name] for params in items], device) for name in items[0]}


def _stacked(values: Sequence[Tensor], device: torch.device | str | None) -> Tensor:
    if all(value is values[0] for value in values):  # one and the same for all travels to the device once
        return values[0].to(device).repeat(len(values), *(1,) * values[0].ndim)
    return torch.stack(list(values)).to(device)


def stack_present(items: Sequence[Params], device: torch.device | str | None = None) -> Params:
    """Stack params of which some of the C have only some, or none: where a tensor is missing it counts as zeros."""
    shapes = {name: value for params in items for name, value in params.items()}
    return {
        name: torch.stack([params.get(name, torch.zeros_like(like)) for params in items]).to(device)
        for name, like in shapes.items()
    }


def row(stacked: Params, index: int) -> Params:
    """Return one client's params out of stacked ones, as tensors of their own on the CPU."""
    return {name: values[index].detach().to("cpu", copy=True) for name, values in stacked.items()}


def weighted_mean(items: Sequence[Params], weights: Sequence[float]) -> Params:
    """Return the mean of C params by ``weights`` (of any sum), added up in float64 in the given order."""
    total = float(sum(weights))
    mean = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in items[0].items()}
    for params, weight in zip(items, weights, strict=True):
        for name, value in params.items():
            mean[name] += value.double() * (weight / total)
    return {name: value.to(items[0][name].dtype) for name, value in mean.items()}


def size_in_bytes(params: Params) -> int:
    """Return how many bytes the tensors take when they travel."""
    return sum(value.numel() * value.element_size() for value in params.values())


def is_finite(params: Params) -> bool:
    """Tell whether no value is infinite or not a number."""
    return all(bool(torch.isfinite(value).all()) for value in params.values())
