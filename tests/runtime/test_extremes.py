"""Every method in the smallest federations, without answers, and with rates that no number survives."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import TINY

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import MethodSettings
from fedprompt.client import evaluate
from fedprompt.client.evaluate import Predictions
from fedprompt.config.parsing import from_dict, load
from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime import training
from fedprompt.runtime.attendance import Attendance
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking import drawn, plots

METHODS = [method.name for method in registry.available()]
SMALL = [*TINY, "data.limit=60", "partition.min_size=1", "data.validation=0.2", "head.shots=1"]
QUICK = {"sweeps": "algorithm.sweeps=2", "iterations": "algorithm.iterations=5"}
SMALLEST = {
    "one client": ("federation.clients=1", "federation.cohort=1", "federation.rounds=1"),
    "one sample each": (
        *("data.limit=50", "partition.kind=iid", "federation.clients=30", "federation.cohort=1"),
        *("federation.rounds=1", "local.batch_size=1"),
    ),
    "one class each": ("partition.kind=shards", "partition.shards_per_client=1", "federation.rounds=1"),
}


@pytest.fixture
def quick(monkeypatch):
    """Runs that train, but guess instead of predicting, and draw no figures: both would take longer than the rest."""

    def guessed(indices, labels):
        rng = np.random.default_rng(len(indices))
        return Predictions(labels[indices], rng.integers(0, 10, len(indices)), rng.random(len(indices), np.float32))

    def predict(self, split, params):
        labels = getattr(self._data, split).labels
        return guessed(np.arange(len(labels)), labels)

    def predict_clients(self, split, models, indices):
        labels = getattr(self._data, split).labels
        return {client: guessed(indices[client], labels) for client in models}

    monkeypatch.setattr(InProcessPool, "predict", predict)
    monkeypatch.setattr(InProcessPool, "predict_clients", predict_clients)
    monkeypatch.setattr(plots, "save", lambda figure, path: None)
    monkeypatch.setattr(plots, "partition_figure", lambda *given: None)
    monkeypatch.setattr(drawn, "final_figures", lambda *given: {})


@pytest.fixture
def nobody_in(monkeypatch):
    """Let nobody answer in the given rounds."""
    usual = training.attendance

    def of(*rounds):
        def asked(section, seed, round, steps):
            return Attendance([], sorted(steps), []) if round in rounds else usual(section, seed, round, steps)

        monkeypatch.setattr(training, "attendance", asked)

    return of


def settings_of(method, *overrides):
    quick = [QUICK[name] for name in registry.get(method).Settings.model_fields if name in QUICK]
    return load(None, [*SMALL, f"algorithm.name={method}", *quick, *overrides])


def result_of(config, folder):
    list(run_in_process(config, folder))
    return json.loads((folder / "result.json").read_text())


def numbers(tree):
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from numbers(value)
    if isinstance(tree, float):
        yield tree


@pytest.mark.parametrize("empty", [(1, 3), (1, 2, 3)], ids=["first and last", "all"])
@pytest.mark.parametrize("method", METHODS)
def test_rounds_without_answers_are_passed_over(method, empty, nobody_in, quick, tmp_path):
    nobody_in(*empty)
    result = result_of(settings_of(method, "federation.rounds=3"), tmp_path)
    assert result["dropped"] > 0
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["final"]["round"] == 3
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert any("the state stays as it was" in line for line in record["warnings"]) == (record["round"] in empty)


@pytest.mark.parametrize("smallest", SMALLEST)
@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_federations_finish(method, smallest, quick, tmp_path):
    result = result_of(settings_of(method, *SMALLEST[smallest]), tmp_path)
    assert all(math.isfinite(number) for number in numbers(result))
    assert result["final"]["accuracy"] is not None


# --- numbers that leave the range of a float

TOO_LARGE = {
    "fedopt": "algorithm.server_lr",
    "fedsgd": "algorithm.server_lr",
    "scaffold": "algorithm.server_lr",
    "mifa": "algorithm.server_lr",
    "pfedpg": "algorithm.server_lr",
    "pfpt": "algorithm.lr",
    "pfpt-units": "algorithm.lr",
    "dpfpt": "algorithm.lr",
}


@pytest.mark.parametrize("method", TOO_LARGE)
def test_a_state_that_leaves_the_range_of_a_float_ends_the_run_and_names_round_and_key(method, quick, tmp_path):
    config = settings_of(method, f"{TOO_LARGE[method]}=1e30", "federation.rounds=4")
    with pytest.raises(RunFailed) as failed:
        list(run_in_process(config, tmp_path))
    line = str(failed.value)
    assert line.startswith("round ")
    assert "\n" not in line
    assert f"{TOO_LARGE[method]} = 1e+30" in line
    state = CheckpointStore(str(tmp_path / "checkpoints")).latest().state
    assert all(torch.isfinite(value).all() for value in state.params.values())


@pytest.mark.parametrize(("method", "personal"), [("fedavg", False), ("fedavg", True), ("dfedavg", False)])
def test_a_loss_that_is_no_number_is_null_in_the_result(method, personal, tmp_path, monkeypatch):
    true = evaluate.F.cross_entropy
    monkeypatch.setattr(evaluate.F, "cross_entropy", lambda *a, **k: true(*a, **k) * float("nan"))
    result = result_of(
        settings_of(method, "local.lr=5000", "federation.max_lost=1", f"head.personal={personal}"), tmp_path
    )
    assert [result[part]["loss"] for part in ("final", "best", "last10")] == [None, None, None]
    assert 0 <= result["last10"]["accuracy"] <= 1


# --- limits of methods' settings


def every_number():
    for method in registry.available():
        for name, field in method.Settings.model_fields.items():
            if any(kind in str(field.annotation) for kind in ("int", "float")):
                yield method.name, name


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400, 1e300])
def test_no_number_of_a_method_may_be_infinite_or_beyond_all_sense(value):
    for method, name in every_number():
        with pytest.raises(InputError, match=rf"algorithm\.{name}: found"):
            from_dict({"algorithm": {"name": method, name: value}})


def test_all_settings_derive_from_one_base():
    for method in registry.available():
        assert issubclass(method.Settings, MethodSettings)
        assert method.Settings.model_config["allow_inf_nan"] is False
        assert method.Settings.model_config["extra"] == "forbid"
        assert method.Settings.model_config["frozen"] is True


def test_the_numbers_of_records_that_hold_none_are_averaged_to_none():
    from fedprompt.runtime.results import _mean

    assert _mean([1.0, None]) is None
    assert _mean([1.0, 2.0]) == np.mean([1.0, 2.0])
