"""Heads equal torch's own layers; dropout is a function of a client's seed and the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedprompt.models.batch import Batch, groups_of
from fedprompt.models.heads.classifier import HeadOptions, dropout_factors
from fedprompt.models.heads.registry import make_head
from fedprompt.models.params import stack


def draw(options: HeadOptions, seed: int = 0) -> dict[str, torch.Tensor]:
    return make_head(options).init(32, 5, np.random.default_rng(seed))


def scores_of(options: HeadOptions, params, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Scores [G, B, K] of x [G, B, D]."""
    counts = (x.shape[1],) * len(x)
    group, slot = groups_of(counts, "cpu")
    batch = Batch(counts, group, slot, torch.zeros_like(group), None, None, None, None, keep)
    return batch.padded(make_head(options).scores(params, batch.unpadded(x), batch))


def as_modules(params) -> list[nn.Linear]:
    layers = []
    for number in range(1, len(params) // 2 + 1):
        weight = params[f"head.{number}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": params[f"head.{number}.bias"]})
        layers.append(layer)
    return layers


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp", 2)])
def test_every_row_equals_torch_linear_with_that_clients_weights(kind, layers):
    options = HeadOptions(kind=kind, hidden=16)
    clients = [draw(options, seed) for seed in range(3)]
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    scores = scores_of(options, stack(clients), x)
    assert scores.shape == (3, 4, 5)
    for client, params in enumerate(clients):
        modules = as_modules(params)
        assert len(modules) == layers
        torch.testing.assert_close(scores[client], nn.Sequential(*modules)(x[client]).detach(), atol=1e-6, rtol=1e-5)


def test_dropout_factors_multiply_the_hidden_layer_only():
    params = draw(HeadOptions(hidden=16))
    first, second = as_modules(params)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    keep = 2.0 * (torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) > 0.5)
    expected = second(first(x) * keep).detach()
    found = scores_of(HeadOptions(hidden=16), stack([params]), x[None], keep[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_linear_head_has_no_dropout():
    options = HeadOptions(kind="linear")
    params, x = stack([draw(options)]), torch.randn(1, 4, 32)
    assert make_head(options).dropped == 0
    assert torch.equal(scores_of(options, params, x, torch.zeros(1, 4, 16)), scores_of(options, params, x))


def test_start_is_within_torchs_bounds_and_fills_them():
    params = draw(HeadOptions(hidden=400))
    shapes = {name: tuple(value.shape) for name, value in params.items()}
    assert shapes == {
        "head.1.weight": (400, 32),
        "head.1.bias": (400,),
        "head.2.weight": (5, 400),
        "head.2.bias": (5,),
    }
    for number, inputs in ((1, 32), (2, 400)):
        weight = params[f"head.{number}.weight"]
        assert 0.97 / inputs**0.5 < weight.abs().max() <= 1 / inputs**0.5
        assert abs(weight.mean()) < 0.05 / inputs**0.5
    assert all(value.dtype == torch.float32 for value in params.values())


SEEDS = torch.tensor([0, 1, 123456789, 2**32 - 1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_has_mean_one(p):
    factors = dropout_factors(SEEDS, 7, 64, 512, p)
    assert factors.shape == (4, 64, 512)
    assert set(factors.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - p))}
    error = 5 * (p / (1 - p) / (64 * 512)) ** 0.5  # five standard errors of a client's mean
    assert ((factors.mean(dim=(1, 2)) - 1).abs() < error).all()


def test_dropout_does_not_depend_on_group_width_or_neighbours():
    wide = dropout_factors(SEEDS, 3, 16, 24, 0.5)
    assert torch.equal(dropout_factors(SEEDS, 3, 5, 24, 0.5), wide[:, :5])
    for client in range(4):
        assert torch.equal(dropout_factors(SEEDS[client : client + 1], 3, 16, 24, 0.5)[0], wide[client])
    assert torch.equal(dropout_factors(SEEDS.flip(0), 3, 16, 24, 0.5), wide.flip(0))


def test_dropout_is_unrelated_between_steps_clients_samples_and_units():
    steps = torch.stack([dropout_factors(SEEDS, step, 16, 64, 0.5) for step in range(6)])  # [6, 4, 16, 64]
    kept = (steps > 0).double() - 0.5
    for flat in (
        kept.reshape(24, -1),
        kept.permute(2, 0, 1, 3).reshape(16, -1),
        kept.permute(3, 0, 1, 2).reshape(64, -1),
    ):
        related = (flat @ flat.T / flat.shape[1]) * 4
        related.fill_diagonal_(0)
        assert related.abs().max() < 6 / flat.shape[1] ** 0.5
