"""Zeroth-order rules: estimates agree with known gradients, steps with the formulas, and losses fall."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fedprompt.client.rules.base import LocalOptions, ZerothOptions
from fedprompt.client.rules.registry import make_rule, without_gradients
from fedprompt.client.rules.zeroth_order import COUNT, MOMENTUM, RGF, SPSA, directions
from fedprompt.errors import InputError

SHAPES = {"visual.a": (2, 3), "visual.b": (4,)}
NO_CMA = importlib.util.find_spec("cma") is None


class Bowl:
    """loss_c = Σ (w − target)² / 2 + a product of two entries, so that directions matter together, too."""

    def __init__(self, targets, seeds):
        self.targets, self.opens_epoch, self.asked = targets, None, 0
        self.rngs = [np.random.default_rng(seed) for seed in seeds]

    def loss(self, params):
        self.asked += 1
        squares = sum((params[n] - t).square().flatten(1).sum(1) / 2 for n, t in self.targets.items())
        return squares + params["visual.a"][:, 0, 0] * params["visual.b"][:, 0] / 2

    def added(self, params):
        return 0.0, {}

    def true_gradient(self, params):
        grads = {n: params[n] - t for n, t in self.targets.items()}
        grads["visual.a"][:, 0, 0] += params["visual.b"][:, 0] / 2
        grads["visual.b"][:, 0] += params["visual.a"][:, 0, 0] / 2
        return grads


def drawn(seed, clients):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(clients, *s, generator=draw, dtype=torch.float64) for n, s in SHAPES.items()}


def options(optimizer="spsa-gc", lr=0.05, **gains):
    return LocalOptions(optimizer=optimizer, prompt_lr=lr, zeroth=ZerothOptions(**gains))


@pytest.mark.parametrize("rule", [SPSA(options(), 0.9), RGF(options())], ids=["spsa", "rgf"])
def test_the_mean_estimate_is_the_gradient_of_a_quadratic(rule):
    clients = 5_000  # the same point for all: as many independent estimates
    point, targets = ({n: v.expand(clients, *v.shape[1:]).clone() for n, v in drawn(s, 1).items()} for s in (0, 1))
    oracle = Bowl(targets, range(clients))
    _, estimate = rule._mean_estimate(point, torch.full((clients,), 0.1, dtype=torch.float64), oracle)
    for name, true in oracle.true_gradient(point).items():
        error = estimate[name].mean(0) - true[0]
        assert (error.abs() < 5 * estimate[name].std(0) / clients**0.5).all()
        assert estimate[name].mean(0).norm() > 0.5


def test_more_directions_make_a_better_estimate():
    point, targets = drawn(0, 500), drawn(1, 500)

    def mean_error(draws):
        oracle = Bowl(targets, range(500))
        estimate = SPSA(options(draws=draws), 0)._mean_estimate(point, torch.full((500,), 0.1), oracle)[1]
        true = oracle.true_gradient(point)
        return float(sum((estimate[n] - true[n]).square().mean() for n in true))

    assert mean_error(10) == pytest.approx(mean_error(1) / 10, rel=0.3)


def test_directions_keep_away_from_zero_and_favour_no_sign():
    oracle = Bowl({}, [0])
    SPSA(options(), 0)._mean_estimate(drawn(0, 1), torch.ones(1), Recording(oracle, seen := []))
    delta = {n: (a[n] - b[n]) / 2 for a, b in [seen] for n in a}
    assert all(((d.abs() >= 0.5) & (d.abs() <= 1)).all() for d in delta.values())
    many = torch.cat(
        [d.flatten() for d in directions({"x": torch.zeros(1, 4000)}, [np.random.default_rng(1)], sign)["x"]]
    )
    assert abs(many.mean()) < 0.1


def sign(rng, shape):
    from fedprompt.client.rules.zeroth_order import _away_from_zero

    return _away_from_zero(rng, shape)


class Recording:
    """Remembers what was asked."""

    def __init__(self, oracle, seen):
        self.rngs, self._seen = oracle.rngs, seen

    def loss(self, params):
        self._seen.append(params)
        return torch.zeros(1)


def test_gradient_corrections_steps_are_those_of_the_formulas():
    a, c, offset, alpha, gamma, beta = 0.05, 0.02, 3.0, 0.4, 0.1, 0.9
    rule = make_rule(options(lr=a, c=c, offset=offset, alpha=alpha, gamma=gamma, beta=beta))
    params, targets = drawn(0, 2), drawn(1, 2)
    oracle, twin = Bowl(targets, [7, 8]), Bowl(targets, [7, 8])  # with the same generators
    slots = rule.start(params, {}, {})
    phi, m = {n: v.clone() for n, v in params.items()}, {n: torch.zeros_like(v) for n, v in params.items()}
    for i in range(1, 5):
        params, slots, losses = rule.step(params, slots, oracle)
        a_i, c_i = a / (i + offset) ** alpha, c / i**gamma
        ahead = {n: phi[n] + beta * m[n] for n in phi}
        delta = directions(phi, twin.rngs, sign)
        above, below = (twin.loss({n: ahead[n] + s * c_i * delta[n] for n in phi}) for s in (1, -1))
        slope = (above - below) / (2 * c_i)
        for n in phi:
            m[n] = beta * m[n] - a_i * slope.view(-1, *(1,) * (phi[n].ndim - 1)) / delta[n]
            phi[n] = phi[n] + m[n]
            torch.testing.assert_close(params[n], phi[n], rtol=0, atol=1e-12)
        torch.testing.assert_close(losses, (above + below) / 2)
    assert oracle.asked == 8


def test_the_counter_and_the_momentum_go_on_where_the_client_left_off():
    targets = drawn(1, 2)

    def walk(breaks):
        oracle, params, kept = Bowl(targets, [7, 8]), drawn(0, 2), {}
        rule = make_rule(options())
        slots = rule.start(params, {}, kept)
        for step in range(6):
            if step in breaks:
                _, kept = rule.finish(params, slots, step)
                rule = make_rule(options())
                slots = rule.start(params, {}, kept)
            params, slots, _ = rule.step(params, slots, oracle)
        return params, rule.finish(params, slots, 6)[1]

    (whole, kept), (broken, again) = walk(()), walk((2, 5))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)
    assert kept.keys() == again.keys() == {COUNT, *(MOMENTUM + n for n in SHAPES)}
    assert kept[COUNT].tolist() == [6, 6]


@pytest.mark.parametrize("optimizer", ["spsa-gc", "spsa", "rgf"])
def test_a_client_walks_alike_alone_and_beside_others(optimizer):
    start, targets = drawn(0, 3), drawn(1, 3)

    def walk(clients):
        oracle = Bowl({n: t[clients] for n, t in targets.items()}, clients)
        rule, params = make_rule(options(optimizer)), {n: v[clients] for n, v in start.items()}
        slots = rule.start(params, {}, {})
        for _ in range(4):
            params, slots, _ = rule.step(params, slots, oracle)
        return params

    together = walk([0, 1, 2])
    for client in range(3):
        alone = walk([client])
        assert all(torch.allclose(together[n][client], alone[n][0], rtol=0, atol=1e-12) for n in alone)


@pytest.mark.parametrize("optimizer", without_gradients("spsa-gc"))
def test_every_estimator_lowers_the_loss(optimizer):
    if optimizer == "cma" and NO_CMA:
        pytest.skip("the package cma is not installed")
    start, targets = drawn(0, 3), drawn(1, 3)
    oracle, rule, params = Bowl(targets, range(3)), make_rule(options(optimizer, lr=0.03)), start
    if optimizer == "cma":
        rule = make_rule(options(optimizer, lr=0.3))
    slots = rule.start(params, {}, {})
    for _ in range(150):
        params, slots, _ = rule.step(params, slots, oracle)
    lowest = drawn(0, 3)
    for _ in range(2000):  # of the true gradient
        grads = oracle.true_gradient(lowest)
        lowest = {n: lowest[n] - 0.1 * grads[n] for n in lowest}
    gap = (oracle.loss(params) - oracle.loss(lowest)) / (oracle.loss(start) - oracle.loss(lowest))
    assert (gap < 0.5).all()


@pytest.mark.skipif(NO_CMA, reason="the package cma is not installed")
def test_cma_draws_from_the_clients_generators_alone():
    def walk():
        rule, params = make_rule(options("cma", lr=0.3)), drawn(0, 2)
        rule.start(params, {}, {})
        oracle = Bowl(drawn(1, 2), [3, 4])
        for _ in range(3):
            params, _, _ = rule.step(params, {}, oracle)
        return params

    first = walk()
    np.random.seed(5)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    second = walk()
    assert (np.random.random(3) == expected).all()  # noqa: NPY002
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_cma_without_its_package_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(InputError, match=r"local\.optimizer: 'cma' needs the package cma.*pip install cma"):
        make_rule(options("cma"))


def test_what_a_client_adds_to_its_loss_is_known_exactly_and_not_asked_for():
    point, targets = drawn(0, 2), drawn(1, 2)
    plain, pulled = Bowl(targets, [7, 8]), Bowl(targets, [7, 8])
    pulled.added = lambda params: (0.0, {n: 3 * value for n, value in params.items()})
    rule = make_rule(options("spsa", lr=0.05))
    (without, _, first), (with_it, _, second) = (
        rule.step(point, rule.start(point, {}, {}), o) for o in (plain, pulled)
    )
    assert plain.asked == pulled.asked == 2
    assert torch.equal(first, second)
    for name, value in point.items():
        torch.testing.assert_close(with_it[name], without[name] - 0.05 / 2**0.4 * 3 * value)
