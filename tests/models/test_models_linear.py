"""Frozen linear layers are F.linear, by other matrix products."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedprompt.models import linear
from fedprompt.models.linear import FrozenLinear, freeze_linears, frozen_linear, plain_linear, product


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(x, weight, bias, direction):
    """Output and gradient of x, by both ways."""
    for layer in (F.linear, frozen_linear):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, weight, bias)
        yield out, torch.autograd.grad((out * direction).sum(), leaf)[0]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_output_and_gradient_are_those_of_linear(with_bias, tokens):
    x, weight, direction = drawn(5, tokens, 24), drawn(40, 24, seed=1), drawn(5, tokens, 40, seed=2)
    bias = drawn(40, seed=3) if with_bias else None
    (out, grad), (frozen_out, frozen_grad) = both(x, weight, bias, direction)
    torch.testing.assert_close(frozen_out, out)
    torch.testing.assert_close(frozen_grad, grad)


def test_parts_of_a_weight_and_inputs_that_are_not_contiguous_are_taken_as_they_are():
    x, weight, direction = drawn(5, 9, 24)[:, ::2], drawn(72, 24, seed=1)[24:], drawn(48, 5, 5, seed=2).permute(1, 2, 0)
    (out, grad), (frozen_out, frozen_grad) = both(x, weight, drawn(72, seed=3)[24:], direction)
    torch.testing.assert_close(frozen_out, out)
    torch.testing.assert_close(frozen_grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_the_matrix_products_also_of_transposed_views(dtype):
    left, right = drawn(3, 5).to(dtype), drawn(5, 7, seed=1).to(dtype)
    torch.testing.assert_close(product(left, right), left @ right)
    torch.testing.assert_close(product(right.T, left.T), right.T @ left.T)
    torch.testing.assert_close(plain_linear(left, right.T, torch.ones(7, dtype=dtype)), left @ right + 1)


def test_a_weight_that_is_trained_gets_its_gradient():
    layer = nn.Sequential(nn.Linear(6, 4))
    freeze_linears(layer)
    out = layer(drawn(3, 6))
    out.sum().backward()
    torch.testing.assert_close(layer[0].weight.grad, drawn(3, 6).sum(0).expand(4, 6))


def test_autocast_still_decides_the_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_linear(drawn(3, 6), drawn(4, 6), None).dtype == torch.bfloat16


def test_builds_without_the_operator_use_linear(monkeypatch):
    monkeypatch.setattr(linear, "_ONEDNN", None)
    assert torch.equal(frozen_linear(drawn(3, 6), drawn(4, 6), None), F.linear(drawn(3, 6), drawn(4, 6)))


def test_backbones_layers_are_frozen_ones_and_keep_their_weights(make_vit, backbone):
    kinds = {type(layer) for layer in backbone.vit.blocks.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {FrozenLinear}
    assert backbone.vit.state_dict().keys() == make_vit().state_dict().keys()
    assert type(copy.deepcopy(backbone.vit).blocks[0].mlp.fc1) is FrozenLinear
