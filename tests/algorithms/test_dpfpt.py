"""Decentralized PFPT: neighbours' prompts are matched by what they are, each client keeps its number of them."""

import numpy as np
import pytest
import torch
from by_hand import make, tiny_run

from fedprompt.algorithms.base import State
from fedprompt.algorithms.pfpt.set_aggregation import aggregate_sets
from fedprompt.client.tasks import Update
from fedprompt.models.params import size_in_bytes

PROMPTS, WIDTH, CLIENTS = 5, 16, 6


def base(seed=0):
    return 0.05 * torch.from_numpy(np.random.default_rng(seed).normal(size=(PROMPTS, WIDTH))).float()


def rounded(method, sets, clients=range(CLIENTS), seed=1):
    """Every client's pool after a round, and the metrics; other params are the client's number."""
    other = "head.1.bias"
    start = {"pool": base(), other: torch.zeros(1)}
    updates = [Update(c, 5, 1, {"pool": sets[c], other: torch.full((1,), float(c))}, None, 0.0) for c in clients]
    state: State = method.init(start, None)
    state, metrics = method.aggregate(state, updates, np.random.default_rng(seed))
    return [method.broadcast(state, client) for client in range(CLIENTS)], metrics


def shuffled(prompts, noise, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(PROMPTS)
    return prompts[order] + noise * torch.from_numpy(rng.normal(size=prompts.shape)).float(), order


@pytest.mark.parametrize("graph", ["ring", "full"])
def test_clients_with_the_same_prompts_keep_them(graph):
    method = make("dpfpt", graph=graph, sweeps=20, merged="mean")
    ends, metrics = rounded(method, [base()] * CLIENTS)
    for own in ends:
        torch.testing.assert_close(own["pool"], base(), atol=1e-6, rtol=0)
    assert metrics["candidates"] == PROMPTS


@pytest.mark.parametrize("graph", ["ring", "exponential", "full"])
def test_shuffled_prompts_are_found_and_averaged_where_their_owner_has_them(graph):
    method = make("dpfpt", graph=graph, sweeps=50, merged="mean")
    sets, orders = zip(*(shuffled(base(), 1e-3, seed) for seed in range(CLIENTS)), strict=True)
    aligned = torch.stack([own[np.argsort(order)] for own, order in zip(sets, orders, strict=True)])
    network = method.network(range(CLIENTS), np.random.default_rng(1))
    ends, _ = rounded(method, sets)
    by_number, _ = rounded(make("dfedavg", graph=graph), sets)
    for client, (own, averaged) in enumerate(zip(ends, by_number, strict=True)):
        expected = aligned[list(network.around(client))].mean(0)[orders[client]]
        torch.testing.assert_close(own["pool"], expected, atol=1e-6, rtol=0)
        assert (averaged["pool"] - expected).abs().max() > 0.02  # by number, different prompts are averaged


def test_prompts_without_a_counterpart_stay_as_they_are():
    method = make("dpfpt", graph="full", sweeps=30, merged="mean")
    sets = [base(seed) * 20 for seed in range(CLIENTS)]  # nothing in common, far apart
    ends, metrics = rounded(method, sets)
    for own, before in zip(ends, sets, strict=True):
        assert torch.equal(own["pool"], before)
    assert metrics["candidates"] == PROMPTS * CLIENTS


def test_on_a_full_graph_it_is_pfpts_own_aggregation_over_all_clients():
    method = make("dpfpt", graph="full", sweeps=10)
    sets = [shuffled(base(), 3e-2, seed)[0] for seed in range(CLIENTS)]
    ends, metrics = rounded(method, sets, seed=1)
    rng = np.random.default_rng(1)
    method.network(range(CLIENTS), rng)
    own = np.random.default_rng([int(rng.integers(2**63)), *range(CLIENTS)])
    fitted = aggregate_sets(torch.stack(sets), method.settings.generative(), own)
    for client, params in enumerate(ends):
        assert torch.equal(params["pool"], fitted.pool[fitted.assignment[client]])
    assert metrics["candidates"] == fitted.metrics["pool_size"]


def test_what_is_no_prompt_is_mixed_by_w_and_the_number_of_prompts_stays():
    method = make("dpfpt", sweeps=2)
    ends, metrics = rounded(method, [shuffled(base(), 1e-2, seed)[0] for seed in range(CLIENTS)])
    expected = [(0 + 1 + 5) / 3, 1, 2, 3, 4, (4 + 5 + 0) / 3]
    assert [own["head.1.bias"].item() for own in ends] == pytest.approx(expected)
    assert all(own["pool"].shape == (PROMPTS, WIDTH) for own in ends)
    assert metrics["up_bytes"] == 12 * size_in_bytes(ends[0])


def test_who_has_no_neighbour_keeps_its_prompts():
    method = make("dpfpt", sweeps=2)
    sets = [shuffled(base(), 1e-2, seed)[0] for seed in range(CLIENTS)]
    ends, metrics = rounded(method, sets, clients=[0, 2, 4])  # of the ring no two of them are neighbours
    for client in (0, 2, 4):
        assert torch.equal(ends[client]["pool"], sets[client])
    assert torch.equal(ends[1]["pool"], base())
    assert metrics["messages"] == 0
    assert "candidates" not in metrics


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["pool", "prompt"])
def test_both_kinds_of_prompts_run_with_compression_of_the_rest(tmp_path, kind):
    options = ("algorithm.name=dpfpt", f"prompt.kind={kind}", "algorithm.sweeps=2", "algorithm.compress=quantise")
    records, state = tiny_run(tmp_path, *options)
    prompts = state.params[kind]
    rest = sum(value.numel() + 4 for name, value in state.params.items() if name != kind)
    assert records[1]["communication"]["up_bytes"] == 12 * (4 * prompts.numel() + rest)
    assert state.clients[2][kind].shape == prompts.shape
