"""Local rules against steps by hand and against torch's own optimizers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedprompt.client.batches import plan_batches
from fedprompt.client.examples import Examples
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.seeding import Stream, generator

CURVATURE = {"prompt": 0.5, "head.1.weight": 3.0}


class Bowl:
    """An oracle with a known gradient: loss_c = sum of a (w - target_c)^2 / 2, with curvature a per tensor."""

    def __init__(self, targets):
        self.targets = targets

    def loss(self, params):
        return sum(a * (params[n] - self.targets[n]).square().flatten(1).sum(1) / 2 for n, a in CURVATURE.items())

    def grad(self, params):
        return self.loss(params), {n: a * (params[n] - self.targets[n]) for n, a in CURVATURE.items()}


def bowl(clients: int = 3):
    draw = torch.Generator().manual_seed(0)
    shapes = {"prompt": (2, 4), "head.1.weight": (3, 4)}
    start, targets = (
        {n: torch.randn(clients, *s, generator=draw, dtype=torch.float64) for n, s in shapes.items()} for _ in range(2)
    )
    return start, Bowl(targets)


def walk(options: LocalOptions, params, oracle, steps: int):
    rule = make_rule(options)
    slots, losses = rule.start(params, {}, {}), []
    for _ in range(steps):
        params, slots, now = rule.step(params, slots, oracle)
        losses.append(now)
    return params, losses


OPTIONS = {
    "adam": LocalOptions(lr=0.1),
    "adam, prompts faster": LocalOptions(lr=0.1, prompt_lr=0.5, betas=(0.8, 0.95), eps=1e-3),
    "sgd": LocalOptions(optimizer="sgd", lr=0.1),
    "sgd, prompts slower": LocalOptions(optimizer="sgd", lr=0.1, prompt_lr=0.01),
    "momentum": LocalOptions(optimizer="sgd", lr=0.1, prompt_lr=0.3, momentum=0.8),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_client_walks_as_torchs_optimizer_would_take_it(options):
    start, oracle = bowl()
    params, losses = walk(options, start, oracle, steps=7)
    for client in range(3):
        own = {name: value[client].clone().requires_grad_() for name, value in start.items()}
        prompt_lr = options.lr if options.prompt_lr is None else options.prompt_lr
        groups = [
            {"params": [own["prompt"]], "lr": prompt_lr},
            {"params": [own["head.1.weight"]], "lr": options.lr},
        ]
        if options.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, betas=options.betas, eps=options.eps)
        else:
            optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)
        for step in range(7):
            optimizer.zero_grad()
            loss = sum(a * (own[n] - oracle.targets[n][client]).square().sum() / 2 for n, a in CURVATURE.items())
            assert losses[step][client].item() == pytest.approx(loss.item(), rel=1e-9)
            loss.backward()
            optimizer.step()
        for name, value in own.items():
            torch.testing.assert_close(params[name][client], value.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_rule_makes_new_params_and_leaves_the_old_ones_alone(options):
    start, oracle = bowl()
    before = {name: value.clone() for name, value in start.items()}
    walk(options, start, oracle, steps=2)
    for name, value in before.items():
        assert torch.equal(start[name], value)


def test_the_prompts_rate_is_for_all_but_the_head_and_defaults_to_lr():
    both = LocalOptions(lr=0.1, prompt_lr=0.5)
    assert [both.rate(n) for n in ("prompt", "pool", "query_proj", "head.1.bias")] == [0.5, 0.5, 0.5, 0.1]
    assert LocalOptions(lr=0.1).rate("pool") == 0.1


def softmax_regression_step(weight, bias, x, y, lr):
    """One SGD step of a linear classifier on mean cross-entropy: the loss before it, weight and bias after it."""
    scores = x @ weight.T + bias
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(len(y)), y]).mean()
    error = (chances - np.eye(len(bias))[y]) / len(y)
    return loss, weight - lr * error.T @ x, bias - lr * error.sum(0)


def test_sgd_on_a_linear_head_equals_the_formula_in_float64(make_model):
    model = make_model("none", head=HeadOptions(kind="linear"))
    rng = np.random.default_rng(0)
    tasks, data = [], []
    for client, samples in ((0, 11), (5, 19)):
        params = {name: value.double() for name, value in model.init(rng).items()}
        tasks.append(Task(client, params, epochs=2))
        labels = rng.integers(0, 5, samples)
        data.append(Examples(labels, np.zeros_like(labels), None, query=rng.normal(size=(samples, 32))))
    rule = make_rule(LocalOptions(optimizer="sgd", lr=0.3))
    updates = train_group(model, tasks, data, Training(rule, 8, lambda name: True, seed=7, round=2))
    for task, examples, update in zip(tasks, data, updates, strict=True):
        weight, bias = (task.params[f"head.1.{part}"].numpy() for part in ("weight", "bias"))
        plan = plan_batches(len(examples), 2, 8, generator(7, Stream.BATCHES, 2, task.client))
        losses = []
        for batch in plan:
            loss, weight, bias = softmax_regression_step(
                weight, bias, examples.query[batch], examples.labels[batch], 0.3
            )
            losses.append(loss)
        np.testing.assert_allclose(update.params["head.1.weight"].numpy(), weight, atol=1e-12)
        np.testing.assert_allclose(update.params["head.1.bias"].numpy(), bias, atol=1e-12)
        assert update.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert update.steps == len(plan)
