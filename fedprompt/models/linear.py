"""Linear maps on the matrix products that are fastest here; layers whose weights never change.

torch multiplies float32 matrices on the CPU by MKL, which leaves half of what an AMD core with AVX-512 can do: 105
Gflop/s against 217 by oneDNN, measured on [200, 768] x [768, 256]. torch's own compiler uses oneDNN's operator that is
called here; builds without oneDNN lack it. Both return the same but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` without gradients, by oneDNN where it is float32 on the CPU."""
    if _ONEDNN is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return _ONEDNN(x, weight, bias, "none", [], "")


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` as ``plain_linear`` computes it."""
    return plain_linear(left, right.T)


class _InputGradient(torch.autograd.Function):
    """x W^T + b, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return plain_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return plain_linear(grad, weight.t()), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, faster where it is float32 on the CPU and the weight asks for no gradient."""
    plain = _ONEDNN is None or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if plain or weight.requires_grad or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    return _InputGradient.apply(x, weight, bias)


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by ``frozen_linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)


def freeze_linears(module: nn.Module) -> None:
    """Turn every plain ``nn.Linear`` inside a module, in place, into a ``FrozenLinear`` with the same weights."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
