"""What tests of federated methods share: whole rounds on a linear head in float64, and the same rounds in numpy.

In numpy a model is {name: array}; a client's local training is ``walk`` with the method's step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import TINY

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import Algorithm, Setting, State
from fedprompt.client.batches import plan_batches
from fedprompt.client.examples import Examples
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.tasks import Training, Update
from fedprompt.client.train import train_group
from fedprompt.config.parsing import load
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.params import Params
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process
from fedprompt.seeding import Stream, generator

Arrays = dict[str, np.ndarray]
Step = Callable[[Arrays, Arrays, bool], Arrays]  # params, gradient, whether an epoch opens -> params

WEIGHT, BIAS = "head.1.weight", "head.1.bias"
SIZES = (11, 3, 19, 8, 5, 24)  # samples of clients 0 to 5: from one batch to three
RATE, EPOCHS, BATCH_SIZE, SEED = 0.3, 2, 8, 7
SGD = LocalOptions(optimizer="sgd", lr=RATE)


def make(name: str, setting: dict[str, Any] | None = None, **settings: Any) -> Algorithm:
    """A method with ``settings`` of its own, in a federation of six clients."""
    cls = registry.get(name)
    return cls(cls.Settings(**settings), Setting(**{"clients": len(SIZES), "cohort": 3, **(setting or {})}))


def linear(make_model):
    """A model that is a linear head on given features [n, 32], 5 classes."""
    return make_model("none", head=HeadOptions(kind="linear"))


def start_of(model) -> Params:
    """Its params at their start, in float64."""
    return {name: value.double() for name, value in model.init(np.random.default_rng(1)).items()}


def examples_of(client: int) -> Examples:
    """A client's features and labels; every client has other features."""
    rng = np.random.default_rng([3, client])
    labels = rng.integers(0, 5, SIZES[client])
    return Examples(labels, np.zeros_like(labels), None, query=rng.normal(client / 4, 1, (len(labels), 32)))


def play(algorithm: Algorithm, model, state: State, cohort, round: int, **other) -> tuple[State, list[Update]]:
    """One round as the federation plays it, the cohort as one group; ``other``: data, options, batch_size."""
    data = other.get("data") or [examples_of(client) for client in cohort]
    rule = algorithm.rule(other.get("options", SGD), round)
    training = Training(rule, other.get("batch_size", BATCH_SIZE), algorithm.trains, SEED, round)
    updates = train_group(model, [algorithm.task(state, client, EPOCHS) for client in cohort], data, training)
    return algorithm.aggregate(state, updates, np.random.default_rng(0))[0], updates


def walk(params: Arrays, client: int, round: int, step: Step) -> tuple[Arrays, int, float]:
    """A client's local training in numpy: where it ends, after how many steps, and the mean loss before the steps."""
    examples, losses = examples_of(client), []
    plan = plan_batches(len(examples), EPOCHS, BATCH_SIZE, generator(SEED, Stream.BATCHES, round, client))
    for number, batch in enumerate(plan):
        loss, grads = softmax_regression(params, examples.query[batch], examples.labels[batch])
        params = step(params, grads, number % (len(plan) // EPOCHS) == 0)
        losses.append(loss)
    return params, len(plan), float(np.mean(losses))


def sgd_step(params: Arrays, grads: Arrays, opens_epoch: bool) -> Arrays:
    """A client's step of plain gradient descent."""
    return combined(lambda w, g: w - RATE * g, params, grads)


def softmax_regression(params: Arrays, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
    """Mean cross-entropy of a linear classifier and its gradient."""
    scores = x @ params[WEIGHT].T + params[BIAS]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    error = (chances - np.eye(len(params[BIAS]))[y]) / len(y)
    return -np.log(chances[np.arange(len(y)), y]).mean(), {WEIGHT: error.T @ x, BIAS: error.sum(0)}


def arrays(params: Params) -> Arrays:
    """Params as arrays."""
    return {name: value.numpy().copy() for name, value in params.items()}


def combined(function: Callable[..., np.ndarray], *params: Arrays) -> Arrays:
    """``function`` of the arrays of one name, for every name."""
    return {name: function(*(each[name] for each in params)) for name in params[0]}


def mean(models: list[Arrays], weights: list[float]) -> Arrays:
    """Mean by weights."""
    return combined(lambda *values: np.average(values, axis=0, weights=weights), *models)


def assert_near(params: Params, expected: Arrays, atol: float = 1e-10) -> None:
    """Equal up to what float64 loses on the way."""
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        assert params[name].dtype == torch.float64
        np.testing.assert_allclose(params[name].numpy(), value, rtol=0, atol=atol, err_msg=name)


class Bowl:
    """An oracle of known gradient: every client's loss is Σ (w − target)² / 2 over all tensors."""

    def __init__(self, targets: Params, opens_epoch: list[bool]) -> None:
        self.targets, self.opens_epoch = targets, torch.tensor(opens_epoch)

    def grad(self, params: Params) -> tuple[torch.Tensor, Params]:
        """Losses [C] and gradients {name: [C, ...]}."""
        grads = {name: value - self.targets[name] for name, value in params.items()}
        return sum(g.square().flatten(1).sum(1) / 2 for g in grads.values()), grads


def drawn(seed: int, clients: int = 3) -> Params:
    """Random stacked params: prompts [C, 2, 4] and a head [C, 3]."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"prompt": (2, 4), BIAS: (3,)}
    return {n: torch.randn(clients, *shape, generator=draw, dtype=torch.float64) for n, shape in shapes.items()}


def tiny_run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], State]:
    """Records and last state of a tiny run, which goes on where there has been one in the folder."""
    records = list(run_in_process(load(None, [*TINY, *overrides]), folder))
    return records, CheckpointStore(str(folder / "checkpoints")).latest().state


def same(first: Params, second: Params) -> bool:
    """Whether two params are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
