"""Params: stacking, taking a row, the weighted mean and sizes."""

from __future__ import annotations

import pytest
import torch

from fedprompt.models.params import is_finite, row, size_in_bytes, stack, weighted_mean


def params(value: float) -> dict[str, torch.Tensor]:
    return {"prompt": torch.full((2, 3), value), "head.1.bias": torch.full((4,), -value)}


def test_a_row_of_stacked_params_is_what_was_stacked():
    stacked = stack([params(1.0), params(2.0)])
    assert stacked["prompt"].shape == (2, 2, 3)
    for name, value in params(2.0).items():
        assert torch.equal(row(stacked, 1)[name], value)


def test_a_row_is_a_copy_without_gradient():
    stacked = {name: value.requires_grad_() for name, value in stack([params(1.0), params(2.0)]).items()}
    mine = row(stacked, 0)
    mine["prompt"].fill_(9)
    assert not mine["prompt"].requires_grad
    assert (stacked["prompt"][0] == 1).all()
    with torch.no_grad():
        stacked["head.1.bias"].fill_(7)
    assert (mine["head.1.bias"] == -1).all()
    assert mine["prompt"].untyped_storage().nbytes() == 2 * 3 * 4  # does not hold on to the other clients' rows


def test_weighted_mean_of_any_weights():
    mean = weighted_mean([params(1.0), params(4.0)], [10, 20])
    assert torch.allclose(mean["prompt"], torch.full((2, 3), 3.0))
    assert torch.allclose(mean["head.1.bias"], torch.full((4,), -3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weighted_mean_keeps_the_dtype(dtype):
    mean = weighted_mean([{"prompt": torch.ones(2, dtype=dtype)}] * 3, [1, 1, 1])
    assert mean["prompt"].dtype == dtype


def test_weighted_mean_adds_in_float64_and_in_the_given_order():
    values = [1e8, 1.0, -1e8]
    items = [{"w": torch.tensor([value])} for value in values]
    assert weighted_mean(items, [1, 1, 1])["w"].item() == pytest.approx(1 / 3, rel=1e-6)  # float32 would say 0
    expected = 0.0
    for value in values:
        expected += value * (1 / 3)
    assert weighted_mean([{"w": i["w"].double()} for i in items], [1, 1, 1])["w"].item() == expected


def test_weighted_mean_leaves_its_inputs_alone_and_wants_a_weight_for_each():
    items = [params(1.0), params(2.0)]
    weighted_mean(items, [1, 1])["prompt"].fill_(5)
    assert (items[0]["prompt"] == 1).all()
    with pytest.raises(ValueError, match="zip"):
        weighted_mean(items, [1])


def test_size_in_bytes_counts_every_tensor_by_its_dtype():
    assert size_in_bytes({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float64)}) == 4 * 15 + 8 * 7
    assert size_in_bytes({}) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_makes_params_not_finite(bad):
    items = params(1.0)
    assert is_finite(items)
    items["head.1.bias"][2] = bad
    assert not is_finite(items)
