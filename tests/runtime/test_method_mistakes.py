"""What a third party's method may get wrong: one line that names the method and the mistake, and a state that stays."""

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from tiny import TINY

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import State
from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.config.parsing import load
from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.run import run_in_process

SMALL = [*TINY, "data.limit=60", "partition.min_size=1", "data.validation=0.2"]


def without(params, name):
    return {own: value for own, value in params.items() if own != name}


def first(params):
    return next(iter(params))


def aggregating(change):
    """An aggregate whose state and metrics ``change`` spoils."""
    return {"aggregate": lambda self, state, updates, rng: change(*FedAvg.aggregate(self, state, updates, rng))}


def with_params(change):
    return aggregating(lambda state, metrics: (State(change(state.params), state.clients, state.memory), metrics))


def with_memory(**memory):
    return aggregating(lambda state, metrics: (State(state.params, state.clients, memory), metrics))


def raising(error):
    def function(*given):
        raise error

    return function


MISTAKES = {
    "nothing": ({"aggregate": lambda *given: None}, "aggregate raised TypeError"),
    "a state alone": (aggregating(lambda state, metrics: state), "aggregate raised TypeError"),
    "params for a state": (aggregating(lambda state, metrics: (state.params, metrics)), "allowed: a State"),
    "missing": (with_params(lambda params: without(params, first(params))), "found no "),
    "unknown": (with_params(lambda params: {**params, "extra": torch.zeros(1)}), "found extra among the params"),
    "shape": (with_params(lambda params: {n: v[:1] for n, v in params.items()}), "; allowed: float32 ["),
    "type": (with_params(lambda params: {n: v.double() for n, v in params.items()}), "as float64 ["),
    "array": (with_params(lambda params: {n: v.numpy() for n, v in params.items()}), "allowed: tensors, by name"),
    "infinite": (with_params(lambda params: {n: v / 0 for n, v in params.items()}), "no longer finite (params['"),
    "no number": (with_memory(sum=torch.tensor([0.0, np.nan])), "no longer finite (memory['sum'])"),
    "unsaveable": (with_memory(sum=np.zeros(3)), "a ndarray, as memory['sum']"),
    "numpy's number": (with_memory(deep=[{"sum": np.float64(3)}]), "a float64, as memory['deep'][0]['sum']"),
    "unknown client": (
        aggregating(lambda state, metrics: (State(state.params, {99: state.params}), metrics)),
        "found a store of client 99; allowed: whole numbers from 0 to 5",
    ),
    "metrics": (aggregating(lambda state, metrics: (state, {"loss": "high"})), "found 'high' for the metric 'loss'"),
    "traffic": (
        aggregating(lambda state, metrics: (state, {"up_bytes": np.nan})),
        "found nan for the metric",
    ),
    "raises": (
        {"aggregate": raising(KeyError("a\nb"))},
        "raised KeyError: 'a\\nb' (test_method_mistakes.py",
    ),
    "overflows": ({"aggregate": raising(OverflowError("too large"))}, "no longer finite (too large)"),
    "far client": (
        {"cohort": lambda *given: [0, 6]},
        "found 6 among [0, 6]; allowed: different whole numbers from 0",
    ),
    "twice": ({"cohort": lambda *given: [1, 1]}, "found 1 among [1, 1]"),
    "names": ({"cohort": lambda *given: ["a"]}, "found ['a']; allowed: different whole numbers"),
    "half": ({"cohort": lambda *given: [0.5]}, "found [0.5]"),
    "no cohort": ({"cohort": lambda *given: None}, "cohort raised TypeError"),
    "epochs": ({"epochs": lambda *given: np.nan}, "found nan; allowed: a number from 0"),
    "broadcast": ({"broadcast": lambda self, state, client: without(state.params, first(state.params))}, "found no "),
    "send": ({"send": lambda *given: [torch.zeros(1)]}, "what send returned cannot be used"),
    "init": ({"init": lambda self, params, rng: State({})}, "what init returned cannot be used: found no "),
    "after": ({"after_test": lambda *given: None}, "what after_test returned cannot be used: found None"),
    "warnings": ({"warnings": lambda *given: "careful"}, "found 'careful'; allowed: a list of lines"),
    "rule": ({"rule": raising(RuntimeError("no rule"))}, "rule raised RuntimeError: no rule"),
    "no rule": ({"rule": lambda *given: None}, "training by its rule raised AttributeError"),
    "summary": ({"summarize": raising(IndexError("none"))}, "summarize raised IndexError: none"),
}


@pytest.fixture
def method_with(registries):
    """Register a method ``theirs``, FedAvg with other functions, until the test ends."""

    def make(functions):
        return registry.algorithm("theirs", "a method of theirs")(type("Theirs", (FedAvg,), functions))

    return make


@pytest.mark.parametrize(("functions", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_the_method_and_spoils_no_checkpoint(functions, told, method_with, tmp_path):
    method_with(functions)
    with pytest.raises(RunFailed) as failed:
        list(run_in_process(load(None, [*SMALL, "algorithm.name=theirs", "prompt.kind=prompt"]), tmp_path))
    line = str(failed.value)
    assert "method 'theirs' (test_method_mistakes.Theirs)" in line
    assert told in line
    assert "\n" not in line
    assert line.startswith(("round 0: ", "round 1: "))
    assert ("error.txt" in line) == (tmp_path / "error.txt").exists() == (" raised " in line)
    assert not list(tmp_path.glob("checkpoints/*000001*"))


def test_a_method_may_choose_nobody_and_may_resize_its_pool(method_with, tmp_path):
    def smaller(self, state, updates, rng):
        after, _ = FedAvg.aggregate(self, state, updates, rng)
        return State({**after.params, "pool": after.params["pool"][1:].clone()}), {"count": np.int64(len(updates))}

    method_with({"cohort": lambda self, state, round, rng: [] if round == 1 else np.arange(3), "aggregate": smaller})
    deadline = ("federation.deadline=100", "prompt.kind=pool", "federation.rounds=2")
    records = list(run_in_process(load(None, [*SMALL, "algorithm.name=theirs", *deadline]), tmp_path))
    assert records[1]["cohort"] == []
    assert records[2]["cohort"] == [0, 1, 2]
    assert records[-1]["result"]["pool_size"] == {"first": 6, "last": 5}


class Loose(BaseModel):
    rate: float = 1.0


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_settings_of_any_class_refuse_infinity(value, method_with):
    method_with({"Settings": Loose})
    with pytest.raises(InputError, match=r"algorithm\.rate: found -?(inf|nan); allowed: a finite number"):
        load(None, [*TINY, "algorithm.name=theirs", f"algorithm.rate={value}"])
