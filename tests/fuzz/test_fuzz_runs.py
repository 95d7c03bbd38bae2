"""Random short runs on a tiny model: each ends with a result or one line, and continues as if it had never stopped."""

import functools
import json
import shutil
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import judged
from tiny import TINY

from fedprompt.algorithms import registry
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process
from fedprompt.tracking import metrics

# Ordinary values and values at the edge, none of which needs much time or memory.
CHOICES = {
    "seed": [1, 2**31],
    "data.limit": [1, 2, 3, 10, 60, 200],
    "data.validation": [1e-9, 0.004, 0.1, 0.5, 0.999],
    "partition.kind": ["iid", "dirichlet", "dominant", "shards", "quantity", "domain"],
    "partition.alpha": [1e-6, 0.01, 0.1, 1, 1e6],
    "partition.min_size": [1, 4, 16],
    "partition.repair": ["move", "refuse"],
    "partition.dominant_share": [0.01, 0.5, 1],
    "partition.shards_per_client": [1, 2, 50],
    "partition.imbalance_factor": [1, 5, 1000],
    "backbone.image_size": [16, 32, 48],
    "backbone.crop": [0.1, 0.875],
    "prompt.kind": ["prompt", "deep", "pool", "none", "adapter", "lora", "full", "visual"],
    "prompt.length": [1, 4],
    "prompt.layer": [0, 1, 11],
    "prompt.init": ["uniform", "patches", "class"],
    "prompt.rank": [1, 4],
    "prompt.pool_size": [1, 3, 8],
    "prompt.top_k": [1, 3],
    "prompt.selection": ["batch", "instance"],
    "prompt.query": ["trained", "frozen", "identity"],
    "prompt.similarity": [-1, 0, 1e9],
    "prompt.strength": [1e-6, 1],
    "head.kind": ["mlp", "linear", "prototypes"],
    "head.hidden": [1, 16],
    "head.dropout": [0, 0.9],
    "head.input": ["features", "logits"],
    "head.personal": [True],
    "head.shots": [1, 8, 1000],
    "head.scale": [1e-6, 1e6],
    "local.optimizer": ["adam", "sgd", "spsa-gc", "spsa", "rgf", "cma"],
    "local.lr": [1e-9, 1e-3, 1, 1e4, 1e30],
    "local.prompt_lr": [1e-9, 1, 1e30],
    "local.epochs": [1, 2],
    "local.batch_size": [1, 2, 1000],
    "local.betas": [[0, 0], [0.5, 0.9999]],
    "local.eps": [1e-30, 1],
    "local.momentum": [0, 0.9],
    "local.rho": [0, 0.05, 10],
    "blackbox.budget": [1, 10, 1000],
    "blackbox.c": [1e-9, 1],
    "blackbox.draws": [1, 3],
    "federation.clients": [1, 2, 6, 30],
    "federation.cohort": [1, 2, 6],
    "federation.eval_every": [1, 2, 5],
    "federation.dropout": [0.5, 0.95],
    "federation.deadline": [0.01, 0.5, 1.5],
    "federation.speed_spread": [0, 500],
    "federation.max_lost": [0, 1],
    "runtime.cpus_per_worker": [0.5, 1],
    "runtime.group_size": [1, 10],
    "runtime.cache_mb": [0, 0.01],
    "runtime.checkpoint_every": [2, 5],
}
ROUNDS = 3


@functools.cache
def own_choices(method: str) -> dict[str, list[typing.Any]]:
    """Values of a method's own settings: the words that are allowed, and numbers of several sizes."""
    chosen = {}
    for name, field in registry.get(method).Settings.model_fields.items():
        words = [
            word for part in (field.annotation, *typing.get_args(field.annotation)) for word in typing.get_args(part)
        ]
        texts = [word for word in words if isinstance(word, str)]
        numbers = [0, 1, 2, 3, 0.5, 0.99, -1, 10, 1e30]
        chosen[f"algorithm.{name}"] = texts or ([True, False] if field.annotation is bool else numbers)
    return chosen


@st.composite
def experiments(draw: st.DrawFn) -> list[str]:
    """Overrides of a tiny experiment: a method, and a few settings of it and of the rest."""
    method = draw(st.sampled_from([method.name for method in registry.available()]))
    own = own_choices(method)
    keys = draw(st.lists(st.sampled_from([*CHOICES, *own, *own]), max_size=5, unique=True))
    chosen = {key: draw(st.sampled_from({**CHOICES, **own}[key])) for key in keys}
    first = ["data.limit=200", f"federation.rounds={ROUNDS}", f"algorithm.name={method}"]
    return [*TINY, *first, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())]


def played(config: Config, folder) -> dict[str, typing.Any] | None:
    """The result of a run that goes on where there is one, or None where it ended with one line."""
    return judged(lambda: list(run_in_process(config, folder))[-1]["result"])


def check_result(result: dict[str, typing.Any], folder) -> None:
    """A result is about all rounds, and its numbers are numbers."""
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result, allow_nan=False))
    assert [record["round"] for record in metrics.read(folder / "metrics.jsonl")] == list(range(ROUNDS + 1))
    for part in ("final", "best", "last10"):
        assert 0 <= result[part]["accuracy"] <= 1
    assert result["rounds"] == ROUNDS


def check_same(first, second, path="state") -> None:
    """Two states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key, value in first.items():
            check_same(value, second[key], f"{path}.{key}")
    else:
        assert first == second, path


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=settings().max_examples // 30)  # a run takes seconds
@given(overrides=experiments())
def test_a_run_ends_with_a_result_or_one_line_and_continues_exactly(overrides, tmp_path_factory):
    config = judged(lambda: load(None, overrides))
    if config is None:
        return
    whole, halves = (tmp_path_factory.mktemp("run") for _ in range(2))
    try:
        result = played(config, whole)
        if result is None:
            return
        check_result(result, whole)
        shorter = config.federation.model_copy(update={"rounds": ROUNDS - 1})
        assert played(config.model_copy(update={"federation": shorter}), halves) is not None
        assert played(config, halves) is not None
        states = [CheckpointStore(str(folder / "checkpoints")).latest().state for folder in (whole, halves)]
        for part in ("params", "clients", "memory"):
            check_same(*(getattr(state, part) for state in states), path=part)
    finally:
        for folder in (whole, halves):
            shutil.rmtree(folder)
