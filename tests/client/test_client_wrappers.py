"""What stands around rules and oracles passes everything on, and with a neutral setting changes no bit."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
from dataclasses import is_dataclass
from importlib import import_module

import numpy as np
import pytest
import torch
from by_hand import drawn, make, same, tiny_run

import fedprompt.algorithms
import fedprompt.client
from fedprompt.algorithms.pfedpg import KeepsHead
from fedprompt.client.rules.base import LocalOptions, LocalRule, Oracle
from fedprompt.client.rules.proximal import Proximal
from fedprompt.client.rules.registry import make_rule, without_gradients
from fedprompt.client.rules.sam import SharpnessAware
from fedprompt.client.rules.wrappers import WrappedOracle, WrappedRule
from fedprompt.models.params import HEAD

NO_CMA = importlib.util.find_spec("cma") is None
RULES = {
    "adam": {"optimizer": "adam"},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    **{name: {"optimizer": name} for name in without_gradients("spsa-gc")},
}
WRAPPERS = {  # each with the setting at which it changes nothing
    "nothing": WrappedRule,
    "proximal": lambda rule: Proximal(rule, make("fedprox", mu=0.0)),
    "proximal, reference": lambda rule: Proximal(rule, make("fedprox", mu=0.0, form="reference")),
    "sam": lambda rule: SharpnessAware(rule, 0.0),
    "keeps head": KeepsHead,  # of params without a head
    "sam of proximal": lambda rule: SharpnessAware(Proximal(rule, make("fedprox", mu=0.0)), 0.0),
    "proximal of proximal": lambda rule: Proximal(
        Proximal(rule, make("fedprox", mu=0.0)), make("fedprox", mu=0.0, form="reference")
    ),
}


class Valley:
    """An oracle with curvature and everything else that a rule may ask for."""

    def __init__(self, opens_epoch: bool, round: int, step: int) -> None:
        self.opens_epoch = torch.tensor([opens_epoch] * 3)
        self.rngs = [np.random.default_rng([round, step, client]) for client in range(3)]

    def loss(self, params):
        return sum((w**4 / 4 - w).flatten(1).sum(1) for w in params.values())

    def grad(self, params):
        return self.loss(params), {name: w**3 - 1 for name, w in params.items()}

    def added(self, params):
        square = sum(w.square().flatten(1).sum(1) for w in params.values())
        return 0.05 * square, {name: 0.1 * w for name, w in params.items()}


def three_rounds(wrap, options):
    """Where clients end, and what they are left with, after three rounds of four steps."""
    params = {name: value for name, value in drawn(3).items() if not name.startswith(HEAD)}
    kept, losses = {}, []
    for round in range(3):
        rule = wrap(make_rule(LocalOptions(**{"lr": 0.02, "prompt_lr": 0.02, **options})))
        slots = rule.start(params, {}, kept)
        for step in range(4):
            params, slots, now = rule.step(params, slots, Valley(step == 0, round, step))
            losses.append(now)
        _, kept = rule.finish(params, slots, 4)
    return params, kept, torch.stack(losses)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", RULES)
def test_with_a_neutral_setting_three_rounds_are_those_of_the_rule_alone(name, wrapper):
    if name == "cma" and NO_CMA:
        pytest.skip("the package cma is not installed")
    params, kept, losses = three_rounds(lambda rule: rule, RULES[name])
    wrapped, also_kept, same_losses = three_rounds(WRAPPERS[wrapper], RULES[name])
    assert same(params, wrapped)
    assert same(kept, also_kept)
    assert torch.equal(losses, same_losses)


def test_a_wrapped_rule_sends_what_the_inner_rule_sends():
    rule = make("scaffold").rule(LocalOptions(optimizer="sgd", lr=0.1), 1)
    params = drawn(0)
    sent = {name: torch.ones_like(value) for name, value in params.items()}
    replies = []
    for wrap in (lambda rule: rule, *WRAPPERS.values()):
        wrapped = wrap(rule)
        slots = wrapped.start(params, sent, {})
        ends, slots, _ = wrapped.step(params, slots, Valley(True, 0, 0))
        replies.append(wrapped.finish(ends, slots, 1))
    assert replies[0][0]
    for reply, kept in replies[1:]:
        assert same(reply, replies[0][0])
        assert replies[0][1].keys() <= kept.keys()


def test_a_pull_comes_on_top_of_what_clients_add_already():
    oracle, params = Valley(False, 0, 0), drawn(0)
    seen = []

    class Asking(LocalRule):
        def step(self, params, slots, oracle):
            seen.append(oracle.added(params))
            return params, slots, oracle.loss(params)

    rule = Proximal(Asking(), make("fedprox", mu=2.0))
    slots = rule.start({name: torch.zeros_like(value) for name, value in params.items()}, {}, {})
    rule.step(params, slots, oracle)
    (term, pull), (before, known) = seen[0], oracle.added(params)
    square = sum(w.square().flatten(1).sum(1) for w in params.values())
    torch.testing.assert_close(term, before + square)
    for name, value in params.items():
        torch.testing.assert_close(pull[name], known[name] + 2 * value)


def public(of):
    return {name for name in {*vars(of), *getattr(of, "__annotations__", {})} if not name.startswith("_")}


@pytest.mark.parametrize(("protocol", "wrapped"), [(LocalRule, WrappedRule), (Oracle, WrappedOracle)])
def test_every_public_name_of_a_protocol_is_passed_on(protocol, wrapped):
    assert public(wrapped) == public(protocol)

    class Inner:
        def __getattr__(self, name):
            return f"inner {name}" if name in getattr(protocol, "__annotations__", {}) else lambda *given: (name, given)

    outer = wrapped(Inner())
    for name in public(protocol):
        if name in getattr(protocol, "__annotations__", {}):
            assert getattr(outer, name) == f"inner {name}"
        else:
            given = tuple(list(inspect.signature(getattr(protocol, name)).parameters)[1:])
            assert getattr(outer, name)(*given) == (name, given)


def test_every_class_around_a_rule_or_an_oracle_derives_from_the_base_classes():
    found = set()
    for package in (fedprompt.client, fedprompt.algorithms):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for _, cls in inspect.getmembers(import_module(module.name), inspect.isclass):
                given = inspect.signature(cls.__init__).parameters if "__init__" in vars(cls) else {}
                kinds = [parameter.annotation for parameter in given.values()]
                plain = cls.__module__ != module.name or is_dataclass(cls)
                if not plain and {"LocalRule", "Oracle"} & set(kinds):
                    found.add(cls)
    assert {Proximal, SharpnessAware} <= found
    assert all(issubclass(cls, (WrappedRule, WrappedOracle)) for cls in found)


@pytest.mark.runs
def test_fedprox_without_a_pull_is_fedavg_where_steps_are_counted_over_rounds(tmp_path):
    common = ("prompt.kind=visual", "prompt.channels=2", "local.optimizer=spsa-gc", "federation.rounds=3")
    _, plain = tiny_run(tmp_path / "a", "algorithm.name=fedavg", *common)
    _, weightless = tiny_run(tmp_path / "b", "algorithm.name=fedprox", "algorithm.mu=0", *common)
    assert same(plain.params, weightless.params)
    assert plain.clients.keys() == weightless.clients.keys()
    assert all(same(plain.clients[client], weightless.clients[client]) for client in plain.clients)
