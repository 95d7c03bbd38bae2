"""Sharpness-aware minimization: against steps by hand, around any rule, and nothing at all at rho = 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import BIAS, Bowl, drawn, same, tiny_run

from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.rules.sam import SamOracle, SharpnessAware, sharpness_aware
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.config.parsing import load
from fedprompt.errors import InputError

RULES = {
    "sgd": LocalOptions(optimizer="sgd", lr=0.05, prompt_lr=0.3),
    "momentum": LocalOptions(optimizer="sgd", lr=0.05, momentum=0.8),
    "adam": LocalOptions(lr=5e-3, prompt_lr=5e-2),
}


class Counting:
    """An oracle with curvature in every direction, Σ w⁴ / 4 per client, that counts its questions."""

    opens_epoch = torch.tensor([True, False, False])

    def __init__(self):
        self.asked = []

    def grad(self, params):
        self.asked.append(params)
        return sum((w**4).flatten(1).sum(1) / 4 for w in params.values()), {n: w**3 for n, w in params.items()}


def test_the_gradient_is_that_of_a_point_at_distance_rho_uphill_with_the_loss_of_the_point_itself():
    params, oracle = drawn(0), Counting()
    losses, grads = SamOracle(oracle, 0.3).grad(params)
    for client in range(3):
        w = np.concatenate([params[name][client].numpy().ravel() for name in ("prompt", BIAS)])
        g = w**3
        expected = (w + 0.3 * g / np.linalg.norm(g)) ** 3
        found = np.concatenate([grads[name][client].numpy().ravel() for name in ("prompt", BIAS)])
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        assert losses[client].item() == pytest.approx((w**4).sum() / 4)
    assert len(oracle.asked) == 2
    assert SamOracle(oracle, 0.3).opens_epoch is oracle.opens_epoch


def test_where_there_is_no_gradient_nothing_is_perturbed():
    start = {name: torch.zeros_like(w) for name, w in drawn(0).items()}
    _, grads = SamOracle(Counting(), 0.3).grad(start)
    assert all(not g.any() for g in grads.values())


@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_any_rule_steps_as_it_would_with_the_gradients_from_uphill(options):
    class Uphill(Bowl):
        def grad(self, params):
            losses, grads = super().grad(params)
            norms = sum(g.square().flatten(1).sum(1) for g in grads.values()).sqrt()
            far = {n: w + 0.2 * grads[n] / norms.reshape(-1, *(1,) * (w.ndim - 1)) for n, w in params.items()}
            return losses, super().grad(far)[1]

    ends = []
    for rule, oracle in (
        (sharpness_aware(make_rule(options), 0.2), Bowl(drawn(1), [False] * 3)),
        (make_rule(options), Uphill(drawn(1), [False] * 3)),
    ):
        params = drawn(0)
        slots = rule.start(params, {}, {})
        for _ in range(5):
            params, slots, _ = rule.step(params, slots, oracle)
        ends.append(params)
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], atol=1e-9, rtol=0)


def test_at_rho_0_the_rule_is_left_as_it_is():
    rule = make_rule(RULES["adam"])
    assert sharpness_aware(rule, 0.0) is rule
    assert isinstance(sharpness_aware(rule, 0.1), SharpnessAware)


@pytest.mark.parametrize("kind", ["prompt", "pool"])
@pytest.mark.parametrize("options", RULES.values(), ids=RULES)
def test_a_fused_group_trains_as_one_client_after_the_other(make_model, make_examples, kind, options):
    model, samples = make_model(kind), (11, 3, 19)
    start = [model.init(np.random.default_rng(client)) for client in range(3)]
    tasks = [Task(client, params) for client, params in enumerate(start)]
    data = [make_examples(n, seed=client) for client, n in enumerate(samples)]
    training = Training(sharpness_aware(make_rule(options), 0.1), 8, lambda name: True, seed=3, round=1)
    plain = Training(make_rule(options), 8, lambda name: True, seed=3, round=1)
    fused, without = (train_group(model, tasks, data, each) for each in (training, plain))
    for task, own, update, unperturbed in zip(tasks, data, fused, without, strict=True):
        (alone,) = train_group(model, [task], [own], training)
        assert update.loss == pytest.approx(alone.loss, rel=1e-4)
        for name, value in update.params.items():
            torch.testing.assert_close(value, alone.params[name], atol=3e-4, rtol=0)
        assert not same(update.params, unperturbed.params)


@pytest.mark.runs
def test_fedsam_is_fedavg_with_rho_and_rho_0_is_fedavg_bit_for_bit(tmp_path):
    runs = {rho: ("algorithm.name=fedavg", *rho) for rho in ((), ("local.rho=0",), ("local.rho=0.5",))}
    plain, zero, sam = (tiny_run(tmp_path / str(i), *run)[1].params for i, run in enumerate(runs.values()))
    assert same(plain, zero)
    assert not same(plain, sam)


@pytest.mark.runs
@pytest.mark.parametrize("method", ["fedprox", "scaffold", "pfpt", "pfedpg"])
def test_methods_with_rules_of_their_own_take_it(tmp_path, method):
    own = ("algorithm.sweeps=2",) if method == "pfpt" else ()
    ends = [
        tiny_run(tmp_path / rho, f"algorithm.name={method}", "federation.rounds=1", f"local.rho={rho}", *own)[1].params
        for rho in ("0", "0.5")
    ]
    assert all(torch.isfinite(value).all() for value in ends[1].values())
    assert not same(*ends)


def test_rho_left_out_is_the_methods_own():
    assert load(None, ["algorithm.name=fedavg"]).local.rho == 0
    assert load(None, ["algorithm.name=dfedsam"]).local.rho == 0.01
    assert load(None, ["algorithm.name=dfedsam", "local.rho=0"]).local.rho == 0


def test_a_negative_rho_is_refused():
    with pytest.raises(InputError, match=r"^local\.rho: found -1"):
        load(None, ["local.rho=-1"])
