"""Set aggregation of adapter and LoRA units: what becomes of the function that they add up to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY

from fedprompt.algorithms.base import Setting, State
from fedprompt.algorithms.pfpt import units
from fedprompt.algorithms.pfpt.set_aggregation import SetAggregation
from fedprompt.algorithms.pfpt.units import PFPTUnits, UnitSettings
from fedprompt.client.tasks import Update
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process

WIDTH, RANK = 64, 8
ADAPTER = {"down": (RANK, WIDTH), "down_bias": (RANK,), "up": (RANK, WIDTH)}
LORA = {"a": (RANK, WIDTH), "b": (RANK, WIDTH)}
GROUPS = {"adapter": ("adapter.3", ADAPTER), "lora": ("lora.3.query", LORA)}


def draw_units(kind, scale, seed):
    """One set of units under the names of ``kind``."""
    group, shapes = GROUPS[kind]
    draw = torch.Generator().manual_seed(seed)
    return {f"{group}.{name}": scale * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def shuffled_copies(base, noise, clients, seed):
    """Noisy copies of a set of units, each client's in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    copies = []
    for _ in range(clients):
        noisy = {name: value + noise * torch.randn(value.shape, generator=draw) for name, value in base.items()}
        order = torch.randperm(RANK, generator=draw)
        copies.append({name: value[order] for name, value in noisy.items()})
    return copies


def output(params, kind, x):
    """The formula: Σ_j gelu(a_j · x + α_j) b_j, or for LoRA Σ_j (a_j · x) b_j, for x [n, D]."""
    of = {name.removeprefix(GROUPS[kind][0] + "."): value for name, value in params.items()}
    if kind == "lora":
        return sum(torch.outer(x @ a, b) for a, b in zip(of["a"], of["b"], strict=True))
    parts = zip(of["down"], of["down_bias"], of["up"], strict=True)
    return sum(torch.outer(F.gelu(x @ a + alpha), b) for a, alpha, b in parts)


def inputs(dtype=torch.float32):
    return torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(99)).to(dtype)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def aggregate(clients, samples=None, **settings):
    updates = [
        Update(client=i, samples=n, steps=1, params=params, selected=None, loss=0.0)
        for i, (params, n) in enumerate(zip(clients, samples or [10] * len(clients), strict=True))
    ]
    algorithm = PFPTUnits(UnitSettings(**settings), Setting(9, len(clients), rank=RANK))
    state, metrics = algorithm.aggregate(State(clients[0]), updates, np.random.default_rng(0))
    return state.params, metrics


@pytest.fixture
def matched_as(monkeypatch):
    """Replace the fit: candidates are the means of the units that a given assignment [C, r] puts together."""

    def replace_fit(assignment):
        def fit(sets, settings, rng, max_size=None):
            one_hot = F.one_hot(assignment.flatten()).to(sets.dtype)  # [C·r, K]
            means = one_hot.T @ sets.flatten(0, 1) / one_hot.sum(0)[:, None]
            return SetAggregation(means, assignment, {"pool_size": float(len(means)), "drift": 0.0})

        monkeypatch.setattr(units, "aggregate_sets", fit)

    return replace_fit


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_shuffled_copies_find_each_other_and_the_function_is_kept(kind):
    clients = shuffled_copies(draw_units(kind, 0.1, seed=0), noise=0.01, clients=5, seed=1)
    params, metrics = aggregate(clients)
    assert metrics["units"] == RANK
    assert metrics["clients_per_candidate"] == 5
    outputs = [output(own, kind, inputs()) for own in clients]
    merged = output(params, kind, inputs())
    assert relative(merged, sum(outputs) / 5) < 0.05
    assert all(relative(merged, own) < 0.25 for own in outputs)
    slots = {name: torch.stack([own[name] for own in clients]).mean(0) for name in clients[0]}
    assert relative(output(slots, kind, inputs()), outputs[0]) > 0.5  # what averaging unit by unit would do


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_units_that_stay_apart_add_up_to_the_clients_mean(kind):
    clients = [draw_units(kind, 1.0, seed) for seed in range(3)]
    params, metrics = aggregate(clients)
    assert metrics["units"] == 3 * RANK
    mean = sum(output(own, kind, inputs()) for own in clients) / 3
    assert relative(output(params, kind, inputs()), mean) < 0.05  # the drift of the fit; the sum would be 2 away


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_output_vectors_count_by_the_share_of_clients_that_have_them(kind, matched_as):
    """Exact, with a fit that leaves all apart, one that merges all, and one that merges a unit of two clients."""
    first, second = ({n: v.double() for n, v in draw_units(kind, 1.0, seed).items()} for seed in (0, 1))
    x, each = inputs(torch.float64), torch.arange(RANK)
    matched_as(torch.stack([each, each + RANK]))
    apart, metrics = aggregate([first, second])
    mean = (output(first, kind, x) + output(second, kind, x)) / 2
    assert metrics == {"units": 2 * RANK, "drift": 0.0}
    torch.testing.assert_close(output(apart, kind, x), mean)
    matched_as(torch.stack([each, each, each]))
    same, _ = aggregate([first, first, first])
    torch.testing.assert_close(same, first)
    order = torch.tensor([3, 1, 0, 2, *range(4, RANK)])
    third = {name: value[order] for name, value in first.items()}
    matched_as(torch.stack([each, each + RANK, order]))
    partly, _ = aggregate([first, second, third])
    torch.testing.assert_close(output(partly, kind, x), (2 * output(first, kind, x) + output(second, kind, x)) / 3)


def test_a_new_unit_is_the_mean_of_the_matched_ones_unless_the_fitted_one_is_asked_for(monkeypatch):
    own = draw_units("lora", 0.1, seed=0)

    def drifted(sets, settings, rng, max_size=None):
        return SetAggregation(sets[0] + 1.0, torch.arange(RANK).expand(2, RANK), {"pool_size": float(RANK)})

    monkeypatch.setattr(units, "aggregate_sets", drifted)
    mean, _ = aggregate([own, own])
    fitted, _ = aggregate([own, own], merged="fitted")
    torch.testing.assert_close(mean, own)
    for name, value in own.items():
        torch.testing.assert_close(fitted[name], value + 1.0)


@pytest.mark.parametrize(("cap", "units", "told"), [(None, 15.5, False), (None, 16.0, True), (7, 7.0, True)])
def test_it_warns_where_all_sets_are_full(cap, units, told):
    lines = PFPTUnits(UnitSettings(max_units=cap), Setting(9, 3, rank=4)).warnings({"units": units})
    assert bool(lines) == told


def test_without_a_cap_of_the_users_units_stay_below_four_times_the_rank():
    clients = [draw_units("adapter", 1.0, seed) for seed in range(6)]  # nothing alike
    assert aggregate(clients)[1]["units"] == 4 * RANK


def test_everything_else_is_averaged_by_samples(matched_as):
    matched_as(torch.arange(RANK).expand(2, RANK))
    base = draw_units("adapter", 1.0, 0)
    others = [{"adapter.3.bias": torch.full((WIDTH,), v), "head.1.bias": torch.full((4,), -v)} for v in (1.0, 5.0)]
    params, _ = aggregate([{**base, **other} for other in others], samples=[10, 30])
    assert torch.allclose(params["adapter.3.bias"], torch.full((WIDTH,), 4.0))
    assert torch.allclose(params["head.1.bias"], torch.full((4,), -4.0))
    assert list(params) == [*base, "adapter.3.bias", "head.1.bias"]


def test_blocks_are_matched_each_for_itself():
    """Block 3 holds copies in other orders, block 12 holds nothing alike: each comes out as it does alone."""
    copies = shuffled_copies(draw_units("adapter", 0.1, seed=0), noise=0.01, clients=4, seed=1)
    foreign = [draw_units("adapter", 1.0, seed) for seed in range(4)]
    both = [
        {**own, **{name.replace("adapter.3", "adapter.12"): value for name, value in other.items()}}
        for own, other in zip(copies, foreign, strict=True)
    ]
    params, metrics = aggregate(both)
    sizes = {name.rpartition(".")[0]: len(value) for name, value in params.items()}
    assert sizes == {"adapter.3": RANK, "adapter.12": 4 * RANK}
    assert metrics["units"] == 2.5 * RANK
    first = {name: value for name, value in params.items() if name.startswith("adapter.3.")}
    mean = sum(output(own, "adapter", inputs()) for own in copies) / 4
    assert relative(output(first, "adapter", inputs()), mean) < 0.1


def test_max_units_keeps_the_most_used_of_every_set():
    clients = shuffled_copies(draw_units("lora", 1.0, seed=0), noise=0.5, clients=3, seed=1)
    free, of_free = aggregate(clients)
    capped, metrics = aggregate(clients, max_units=10)
    assert of_free["units"] > 10
    assert metrics["units"] == len(capped["lora.3.query.a"]) == len(capped["lora.3.query.b"]) == 10
    rows = {tuple(row.tolist()) for row in torch.cat(list(free.values()), dim=1)}
    assert {tuple(row.tolist()) for row in torch.cat(list(capped.values()), dim=1)} <= rows
    roomy, _ = aggregate(clients, max_units=1000)
    assert all(torch.equal(roomy[name], free[name]) for name in free)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_blocks_with_different_numbers_of_units_go_on_training(tmp_path, kind):
    overrides = ("algorithm.name=pfpt-units", f"prompt.kind={kind}", "prompt.rank=4", "local.prompt_lr=0.005")
    config = load(None, [*TINY, *overrides, "federation.rounds=3", "algorithm.sweeps=5", "algorithm.max_units=20"])
    records = list(run_in_process(config, tmp_path))
    params = CheckpointStore(str(tmp_path / "checkpoints")).latest().state.params
    inward = "down" if kind == "adapter" else "a"
    sizes = {name: len(value) for name, value in params.items() if name.endswith(f".{inward}")}
    assert len(set(sizes.values())) > 1
    assert all(4 <= size <= 20 for size in sizes.values())
    assert records[3]["aggregate"]["units"] == np.mean(list(sizes.values()))
    outward = "up" if kind == "adapter" else "b"
    for name, size in sizes.items():
        assert len(params[f"{name.rpartition('.')[0]}.{outward}"]) == size
    sent = [record["communication"]["down_bytes"] for record in records[1:-1]]
    units = [4.0, *(record["aggregate"]["units"] for record in records[1:-2])]  # at the start of each round
    assert [b > a for a, b in pairwise(sent)] == [b > a for a, b in pairwise(units)]  # what a round sends are all units
    assert sent[0] < sent[-1]
    assert all(torch.isfinite(value).all() for value in params.values())


def test_what_has_no_units_is_refused():
    with pytest.raises(InputError, match=r"prompt\.kind: 'pool' .* allowed: adapter, lora"):
        load(None, ["algorithm.name=pfpt-units", "prompt.kind=pool"])
