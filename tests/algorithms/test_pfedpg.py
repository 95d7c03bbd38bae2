"""pFedPG: the generator against an independent transcription in float64, and what its clients keep at home."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedprompt.algorithms.base import Setting
from fedprompt.algorithms.pfedpg import PFedPG, PFedPGSettings, generate, generator_gradient
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.tasks import Update
from fedprompt.models.params import row, stack, stack_present

CLIENTS, LENGTH, WIDTH = 5, 4, 6


@pytest.fixture
def generator():
    """A generator in float64, with weights large enough for attention to be far from uniform."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"base": (LENGTH, WIDTH), "descriptors": (CLIENTS, WIDTH)}
    shapes |= dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH))
    return {name: torch.randn(*shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}


def transcribed(theta, client):
    """prompt_t = P + W_o Attn(q = d_t W_q, K = P W_k, V = P W_v), word for word."""
    d, p = theta["descriptors"][client : client + 1], theta["base"]
    q, k, v = d @ theta["query"], p @ theta["key"], p @ theta["value"]
    scores = torch.exp(q @ k.T / math.sqrt(WIDTH))
    return p + (scores / scores.sum()) @ v @ theta["out"]


def step(theta, clients, moves, rate):
    """θ − η · mean over clients of ∂⟨prompt_t(θ), move_t⟩ / ∂θ, by autograd through the transcription."""
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    inner = sum((transcribed(leaves, c) * moves[c]).sum() for c in clients) / len(clients)
    inner.backward()
    return {name: (leaf - rate * leaf.grad).detach() for name, leaf in leaves.items()}


def update(client, params, kept=None, samples=10):
    return Update(client, samples, steps=1, params=params, selected=None, loss=0.0, kept=kept or {})


def begun(name="prompt", dtype=torch.float64, **settings):
    """The method and its state at the start, on params with a head (and, on a pool, ``query_proj``)."""
    draw = torch.Generator().manual_seed(1)
    params = {name: torch.randn(LENGTH, WIDTH, generator=draw, dtype=dtype), "head.1.bias": torch.zeros(3, dtype=dtype)}
    if name == "pool":
        params["query_proj"] = torch.zeros(WIDTH, WIDTH, dtype=dtype)
    algorithm = PFedPG(PFedPGSettings(**settings), Setting(CLIENTS, 3))
    return algorithm, algorithm.init(params, np.random.default_rng(0))


def returned(algorithm, state, clients, seed=2):
    """Updates whose prompts have moved somewhere from what was sent."""
    draw = torch.Generator().manual_seed(seed)
    updates = []
    for client in clients:
        params = algorithm.broadcast(state, client)
        name = "pool" if "pool" in params else "prompt"
        move = 0.1 * torch.randn(params[name].shape, generator=draw, dtype=params[name].dtype)
        updates.append(update(client, {**params, name: params[name] + move}))
    return updates


def test_generated_prompts_are_those_of_the_formula(generator):
    for client in range(CLIENTS):
        made = generate(generator, client)
        assert made.shape == (LENGTH, WIDTH)
        torch.testing.assert_close(made, transcribed(generator, client), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(generate(generator, 0), generate(generator, 1), atol=0.1)


def test_the_generators_gradient_is_that_of_the_product_with_the_move(generator):
    move = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ours = generator_gradient(generator, 2, move)
    by_autograd = {n: generator[n] - value for n, value in step(generator, [2], {2: move}, 1.0).items()}
    assert ours.keys() == generator.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, by_autograd[name], rtol=1e-10, atol=1e-12)
        at, tiny = (2, 1), 1e-6
        sides = []
        for way in (tiny, -tiny):
            nudged = {**generator, name: generator[name].clone()}
            nudged[name][at] += way
            sides.append(float((transcribed(nudged, 2) * move).sum()))
        assert float(gradient[at]) == pytest.approx((sides[0] - sides[1]) / (2 * tiny), rel=1e-5, abs=1e-8)
        assert float(gradient[at]) != 0


def test_a_client_schedule_is_a_step_per_client_in_turn_and_a_cohort_schedule_one_along_the_mean():
    rate, cohort = 0.3, [0, 2, 3]
    for schedule in ("client", "cohort"):
        algorithm, state = begun(schedule=schedule, server_lr=rate)
        theta = state.memory["generator"]
        updates = returned(algorithm, state, cohort)
        moves = {u.client: transcribed(theta, u.client) - u.params["prompt"] for u in updates}  # sent − returned
        for clients in [[c] for c in cohort] if schedule == "client" else [cohort]:
            theta = step(theta, clients, moves, rate)
        after, _ = algorithm.aggregate(state, updates, np.random.default_rng(0))
        for name, value in after.memory["generator"].items():
            torch.testing.assert_close(value, theta[name], rtol=1e-10, atol=1e-12)
        shown = torch.stack([transcribed(theta, client) for client in range(CLIENTS)]).mean(0)
        torch.testing.assert_close(after.params["prompt"], shown, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule", ["client", "cohort"])
def test_descriptors_of_clients_that_took_no_part_do_not_move(schedule):
    algorithm, state = begun(schedule=schedule)
    after, _ = algorithm.aggregate(state, returned(algorithm, state, [1, 4]), np.random.default_rng(0))
    before, now = (s.memory["generator"]["descriptors"] for s in (state, after))
    moved = [not torch.equal(before[client], now[client]) for client in range(CLIENTS)]
    assert moved == [False, True, False, False, True]


def test_a_small_step_moves_a_clients_prompts_towards_what_it_returned():
    algorithm, state = begun(server_lr=1e-3)
    (back,) = returned(algorithm, state, [3])
    sent = algorithm.broadcast(state, 3)["prompt"]
    after, _ = algorithm.aggregate(state, [back], np.random.default_rng(0))
    now = algorithm.broadcast(after, 3)["prompt"]
    assert (now - back.params["prompt"]).norm() < (sent - back.params["prompt"]).norm()
    assert not torch.equal(now, sent)


def test_a_client_that_returns_what_it_was_sent_moves_nothing():
    algorithm, state = begun()
    updates = [update(client, algorithm.broadcast(state, client)) for client in (0, 1)]
    after, metrics = algorithm.aggregate(state, updates, np.random.default_rng(0))
    for name, value in after.memory["generator"].items():
        assert torch.equal(value, state.memory["generator"][name])
    assert metrics["prompt_spread_relative"] > 0  # clients have descriptors of their own from the start


def test_on_a_pool_the_query_projection_is_averaged_by_samples_and_shared():
    algorithm, state = begun("pool", torch.float32)
    updates = []
    for client, samples, value in ((0, 10, 1.0), (4, 30, 5.0)):
        params = {**algorithm.broadcast(state, client), "query_proj": torch.full((WIDTH, WIDTH), value)}
        updates.append(update(client, params, samples=samples))
    state, _ = algorithm.aggregate(state, updates, np.random.default_rng(0))
    first, second = (algorithm.broadcast(state, client) for client in (0, 2))
    assert torch.allclose(first["query_proj"], torch.full((WIDTH, WIDTH), 4.0))
    assert torch.equal(first["query_proj"], second["query_proj"])
    assert not torch.allclose(first["pool"], second["pool"])
    assert first["pool"].shape == (LENGTH, WIDTH)


class Valley:
    """A toy oracle: each tensor is pulled to a target of its own, so that the head's gradient is the head's alone."""

    def __init__(self, targets):
        self.targets = targets

    def grad(self, params):
        grads = {name: (value - self.targets[name][: len(value)]) ** 3 for name, value in params.items()}
        return torch.zeros(len(next(iter(params.values())))), grads


def participate(algorithm, state, clients, steps, targets, options):
    """Some clients take part as a group: their updates after ``steps`` steps on the toy oracle."""
    rule = algorithm.rule(options, 1)
    tasks = [algorithm.task(state, client, 1.0) for client in clients]
    params = stack([task.params for task in tasks])
    slots = rule.start(params, {}, stack_present([task.kept for task in tasks]))
    oracle = Valley({name: torch.stack([targets[c][name] for c in clients]) for name in params})
    for _ in range(steps):
        params, slots, _ = rule.step(params, slots, oracle)
    reply, kept = rule.finish(params, slots, steps)
    assert not reply
    return [update(client, row(params, i), row(kept, i)) for i, client in enumerate(clients)]


def by_torch(starts, target, steps, options):
    """One torch.optim.Adam through several participations; a participation may start at a value of its own (or not)."""
    leaf = starts[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=options.lr, betas=options.betas, eps=options.eps)
    for start, count in zip(starts, steps, strict=True):
        if start is not None:
            leaf.data.copy_(start)
        for _ in range(count):
            leaf.grad = (leaf.detach() - target) ** 3
            optimizer.step()
    return leaf.detach()


def test_the_heads_optimizer_goes_on_where_it_stopped_and_that_of_the_prompts_starts_anew():
    """Client 1 takes part twice, client 2 for the first time when client 1 comes again, in one group."""
    options = LocalOptions(lr=0.05, prompt_lr=0.05)
    algorithm, state = begun()
    draw = torch.Generator().manual_seed(4)
    shapes = {name: value.shape for name, value in state.params.items()}
    targets = {c: {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in shapes.items()} for c in (1, 2)}
    first = participate(algorithm, state, [1], 3, targets, options)
    state, _ = algorithm.aggregate(state, first, np.random.default_rng(0))
    assert {name for name in state.clients[1] if not name.startswith("rule.")} == {"head.1.bias"}
    sent = algorithm.broadcast(state, 1)["prompt"]
    again, late = participate(algorithm, state, [1, 2], 4, targets, options)
    zeros, head = torch.zeros(3, dtype=torch.float64), "head.1.bias"
    uninterrupted = by_torch([zeros, None], targets[1][head], [3, 4], options)
    torch.testing.assert_close(again.params[head], uninterrupted, rtol=1e-9, atol=1e-9)
    forgetful = by_torch([first[0].params[head]], targets[1][head], [4], options)
    assert not torch.allclose(again.params[head], forgetful, atol=1e-4)
    anew = by_torch([sent], targets[1]["prompt"], [4], options)
    torch.testing.assert_close(again.params["prompt"], anew, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(late.params[head], by_torch([zeros], targets[2][head], [4], options), rtol=1e-9, atol=0)
    assert again.kept["count.head.1.bias"].item() == 7
    assert late.kept["count.head.1.bias"].item() == 4
