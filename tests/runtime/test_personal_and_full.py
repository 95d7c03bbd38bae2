"""Models of clients' own (personal heads, pFedPG, local) and whole backbones: what travels, and how they are scored."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedprompt.models.params import HEAD, size_in_bytes
from fedprompt.models.weights.named import create_backbone
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.scoring import SUBSAMPLE, subsample

SHARED = {  # of a method: times that what is shared goes one way (SCAFFOLD sends controls along)
    "fedavg": 1,
    "pfpt": 1,
    "fedprox": 1,
    "scaffold": 2,
    "fedopt": 1,
    "gmm": 1,
}


def scored_by_hand(config, state, split):
    """Accuracies of every client's own model: their mean on the split's subsample, and those on local test data."""
    data, algorithm = build_data(config), build_algorithm(config)
    pool = InProcessPool(config, data)
    said = [pool.predict(split, algorithm.broadcast(state, client)) for client in range(config.federation.clients)]
    part = subsample(getattr(data, split).labels, config.seed)
    local = zip(said, data.local_tests, strict=True) if split == "test" else ()
    accuracies = [own.take(indices).accuracy for own, indices in local if len(indices)]
    return np.mean([own.take(part).accuracy for own in said]), np.mean(accuracies) if accuracies else None


@pytest.mark.parametrize("method", SHARED)
def test_personal_heads_stay_at_home_and_both_scores_are_told(runs, method):
    own_settings = ["algorithm.sweeps=2"] if method == "pfpt" else []
    records = runs.local(method, f"algorithm.name={method}", "head.personal=true", "federation.rounds=2", *own_settings)
    result, state = records[-1]["result"], runs.state(method)
    for name in ("own_head_global_accuracy", "averaged_head_global_accuracy"):
        assert 0 <= result["clients"][name] <= 1
        of_rounds = [record["clients"][name] for record in records[1:-1]]
        assert result["last10"][f"client_{name}"] == pytest.approx(np.mean(of_rounds))
        assert result["final"][f"client_{name}"] == result["clients"][name] == of_rounds[-1]
    assert result["clients"]["averaged_head_global_accuracy"] == result["final"]["accuracy"]
    shared = {name: value for name, value in state.params.items() if not name.startswith(HEAD)}
    for before, record in itertools.pairwise(records[:-1]):
        if "pool" in shared:  # its size is that of the round before
            shared["pool"] = torch.zeros(int(before["aggregate"]["pool_size"]), 64)
        size = 3 * SHARED[method] * size_in_bytes(shared)
        assert record["communication"] == {"up_bytes": size, "down_bytes": size}
    assert state.clients.keys() == {client for record in records[1:-1] for client in record["cohort"]}
    first, second = sorted(state.clients)[:2]
    heads = [name for name in state.params if name.startswith(HEAD)]
    assert all(not torch.equal(state.clients[first][name], state.clients[second][name]) for name in heads)


def test_own_heads_are_scored_on_the_subsample_and_on_local_test_data(runs):
    overrides = ("algorithm.name=fedavg", "head.personal=true")
    result = runs.local("own", *overrides)[-1]["result"]
    on_subsample, on_local = scored_by_hand(runs.config(*overrides), runs.state("own"), "test")
    assert len(build_data(runs.config(*overrides)).test) > SUBSAMPLE
    assert result["clients"]["own_head_global_accuracy"] == pytest.approx(on_subsample)
    assert result["clients"]["mean_accuracy"] == pytest.approx(on_local)
    assert on_subsample < on_local  # they know their own classes


@pytest.mark.parametrize(
    "overrides",
    [("algorithm.name=pfedpg",), ("algorithm.name=local",), ("algorithm.name=local", "prompt.kind=none")],
    ids=["pfedpg", "local", "local, head alone"],
)
def test_where_there_is_no_global_model_scores_are_means_over_the_clients_own(runs, overrides):
    result = runs.local("own", *overrides)[-1]["result"]
    config, state = runs.config(*overrides), runs.state("own")
    on_subsample, on_local = scored_by_hand(config, state, "test")
    assert result["final"]["accuracy"] == pytest.approx(on_subsample)
    assert result["final"]["validation_accuracy"] == pytest.approx(scored_by_hand(config, state, "validation")[0])
    assert result["clients"]["own_head_global_accuracy"] == result["final"]["accuracy"]
    assert result["clients"]["mean_accuracy"] == pytest.approx(on_local)


def test_pfedpg_sends_prompts_alone_and_leaves_head_and_its_moments_with_the_client(runs):
    records = runs.local("pfedpg", "algorithm.name=pfedpg")
    state = runs.state("pfedpg")
    prompts = 3 * 10 * 64 * 4  # a cohort's
    for record in records[1:-1]:
        assert record["communication"] == {"up_bytes": prompts, "down_bytes": prompts}
    assert state.clients.keys() == {client for record in records[1:-1] for client in record["cohort"]}
    for store in state.clients.values():
        assert {"head.1.weight", "rule.first.head.1.weight", "rule.count.head.1.weight"} <= store.keys()
        assert all(HEAD in name for name in store)


def test_the_subsample_is_fixed_and_holds_every_class_with_its_share():
    labels = np.random.default_rng(0).choice(4, 1500, p=[0.6, 0.3, 0.08, 0.02])
    part = subsample(labels, 3)
    assert np.array_equal(part, subsample(labels, 3))
    assert not np.array_equal(part, subsample(labels, 4))
    assert len(np.unique(part)) == SUBSAMPLE
    expected = np.bincount(labels) * SUBSAMPLE / len(labels)
    assert np.abs(np.bincount(labels[part]) - expected).max() < 2
    assert np.array_equal(subsample(labels[:50], 3), np.arange(50))


@pytest.fixture
def without_classifier(tmp_path):
    """Overrides for weights without a classifier of their own, which would be frozen and never sent."""
    path = tmp_path / "weights.pt"
    weights = create_backbone("test_vit", "random", 32).state_dict()
    torch.save({name: value for name, value in weights.items() if not name.startswith("head.")}, path)
    return f"backbone.weights={path}"


@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_full_fine_tuning_sends_the_full_model_and_trains_all_of_it(runs, without_classifier, method):
    options = (f"algorithm.name={method}", "prompt.kind=full", "federation.rounds=2", without_classifier)
    records = runs.local(method, *options)
    sent, params = records[-1]["result"]["communication"], runs.params(method)
    assert sent["up_bytes"] == sent["down_bytes"] == 2 * 3 * size_in_bytes(params)
    assert sent["up_bytes"] + sent["down_bytes"] == sent["full_model_bytes"]
    config = runs.config(*options)
    start = InProcessPool(config, build_data(config)).facts.params
    assert start.keys() == params.keys()
    assert [name for name in start if torch.equal(start[name], params[name])] == []
    assert all(torch.isfinite(value).all() for value in params.values())


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_adapters_and_lora_are_trained_by_fedavg_and_fedprox(runs, kind):
    for method, own in (("fedavg", ()), ("fedprox", ("algorithm.mu=10",))):
        records = runs.local(
            f"{method}", f"algorithm.name={method}", f"prompt.kind={kind}", "federation.rounds=2", *own
        )
        sent = records[-1]["result"]["communication"]
        assert sent["up_bytes"] == 2 * 3 * size_in_bytes(runs.params(method)) < sent["full_model_bytes"] / 2
    average, pulled = runs.params("fedavg"), runs.params("fedprox")
    outward = [name for name in average if name.endswith((".up", ".b"))]  # they start at zero
    assert outward
    size = {name: (average[name].norm(), pulled[name].norm()) for name in outward}
    assert all(free > held > 0 for free, held in size.values())  # the proximal term holds them near their start


def test_whole_backbones_on_two_threads_give_the_same_bits_as_one_after_the_other(runs, same_params):
    for workers in (1, 2):
        runs.local(f"{workers}", "algorithm.name=fedavg", "prompt.kind=full", f"runtime.workers={workers}")
    assert same_params(runs.params("1"), runs.params("2"))
    assert runs.lines("1") == runs.lines("2")
