"""Black-box runs in one process: who holds the model, what is recorded, and how they end and go on."""

import json

import numpy as np
import pytest
import torch

from fedprompt.cli import main
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.models.backbones.vit import to_pixels
from fedprompt.runtime import build
from fedprompt.runtime.build import build_data, worker_parts
from fedprompt.runtime.pool import public_split, service_here
from fedprompt.runtime.worker import Worker
from fedprompt.seeding import Stream, generator

BLACK = "algorithm.name=fedbbpt"
VISUAL = "prompt.kind=visual"


@pytest.fixture(scope="module")
def black(shared_runs):
    """Records of one black-box run, which several tests look at."""
    return shared_runs.local("black", BLACK)


def test_round_0_is_the_service_without_any_prompt(black, shared_runs):
    config = shared_runs.config(BLACK)
    data = build_data(config)
    service, test = service_here(config, data), data.test.take(np.arange(len(data.test)))
    pixels = to_pixels(torch.from_numpy(test.inputs.array), 32, 1.0).expand(-1, 3, -1, -1).numpy()
    predicted = service.scores(0, pixels, (1,)).argmax(1)
    assert black[0]["test"]["accuracy"] == pytest.approx((predicted == test.labels).mean())


def test_queries_are_counted_by_client_and_those_of_evaluation_apart(black, shared_runs):
    data = build_data(shared_runs.config(BLACK))
    per_evaluation = len(data.test) + len(data.validation)
    expected = dict.fromkeys(range(6), 0)
    for round, record in enumerate(black[:-1]):
        for client in record.get("cohort", ()):
            expected[client] += 2 * int(data.sizes[client])  # one epoch, two queries per image
        assert record["queries"] == {"train": sum(expected.values()), "evaluation": (round + 1) * per_evaluation}
    queries = black[-1]["result"]["queries"]
    assert queries["train"] == sum(expected.values())
    assert queries["evaluation"] == 4 * per_evaluation
    assert {int(c): n for c, n in queries["clients"].items()} == {c: n for c, n in expected.items() if n}


def test_a_run_without_a_service_has_no_queries(runs):
    records = runs.local("white", "algorithm.name=fedavg", VISUAL, "federation.rounds=1")
    assert "queries" not in records[1]
    assert records[-1]["result"]["queries"] is None


def test_only_generators_travel_and_the_model_stays_where_it_is(black, shared_runs):
    params = shared_runs.params("black")
    assert {name.partition(".")[0] for name in params} == {"visual"}
    size = sum(v.numel() * 4 for v in params.values())
    assert black[1]["communication"] == {"up_bytes": 3 * size, "down_bytes": 3 * size}


def test_a_worker_with_a_service_never_loads_the_backbone(shared_runs, monkeypatch):
    config = shared_runs.config(BLACK)
    data = build_data(config)
    service = service_here(config, data)
    monkeypatch.setattr(build, "load_backbone", lambda *_, **__: pytest.fail("a worker loads the backbone"))
    worker = Worker(worker_parts(config, data), 1, None, service)
    facts = worker.facts()
    assert "_model" not in vars(worker)
    assert not facts.fusable
    assert facts.full_model_bytes > 10 * sum(v.numel() * 4 for v in facts.params.values())
    with pytest.raises(pytest.fail.Exception, match="loads the backbone"):
        _ = Worker(worker_parts(config, data), 1, public_split(data))._model


def test_public_images_are_no_clients_own_and_depend_on_the_seed_alone(shared_runs):
    config = shared_runs.config(BLACK, "head.shots=3")
    data = build_data(config)
    assert np.bincount(data.public.labels).tolist() == [3] * 10
    held = [set(view.indices) for view in (data.public, data.train, data.validation)]
    assert sum(map(len, held)) == len(set.union(*held)) == 500
    other = build_data(shared_runs.config(BLACK, "head.shots=3", "partition.alpha=5", "federation.clients=3"))
    assert (other.public.indices == data.public.indices).all()
    assert len(build_data(shared_runs.config()).public) == 0


def test_workers_and_their_number_change_nothing(shared_runs, black, same_params):
    shared_runs.local("threads", BLACK, "runtime.workers=3")
    assert same_params(shared_runs.params("threads"), shared_runs.params("black"))
    assert shared_runs.lines("threads") == shared_runs.lines("black")


@pytest.mark.parametrize(
    "method", [(BLACK, "blackbox.budget=100"), ("algorithm.name=local", VISUAL, "local.optimizer=spsa-gc")]
)
def test_a_resumed_run_is_the_run_that_was_never_interrupted(runs, same_params, method):
    runs.local("whole", *method)
    runs.local("parts", *method, "federation.rounds=1")
    (runs.folder / "parts" / "result.json").unlink()
    runs.local("parts", *method)
    assert same_params(runs.params("parts"), runs.params("whole"))
    whole, parts = runs.state("whole").clients, runs.state("parts").clients
    assert all(same_params(parts[client], whole[client]) for client in whole)
    assert runs.lines("parts") == runs.lines("whole")
    results = [json.loads((runs.folder / name / "result.json").read_text()) for name in ("whole", "parts")]
    assert results[0]["queries"] == results[1]["queries"]


def test_a_budget_that_is_used_up_is_in_the_record_and_never_passed(runs):
    records = runs.local("short", BLACK, "blackbox.budget=70", "federation.rounds=4", "federation.eval_every=4")
    assert any(record["out_of_budget"] for record in records[1:-1])
    told = [warning for record in records[1:-1] for warning in record["warnings"]]
    assert any("have used up their queries" in line for line in told)
    assert max(records[-1]["result"]["queries"]["clients"].values()) <= 70


@pytest.mark.parametrize("method", ["fedprox", "fedopt", "local", "centralized", "fedavg"])
@pytest.mark.parametrize("optimizer", ["spsa-gc", "rgf"])
def test_other_methods_are_black_box_ones_by_their_optimizer(runs, method, optimizer):
    overrides = (f"algorithm.name={method}", VISUAL, f"local.optimizer={optimizer}", "federation.rounds=1")
    result = runs.local(method, *overrides)[-1]["result"]
    assert result["queries"]["train"] > 0


def test_fedprox_without_its_pull_is_fedbbpt_and_a_strong_pull_holds_back(runs):
    runs.local("plain", BLACK, "federation.rounds=1")
    prox = ("algorithm.name=fedprox", VISUAL, "local.optimizer=spsa-gc", "federation.rounds=1")
    runs.local("zero", *prox, "algorithm.mu=0")
    runs.local("strong", *prox, "algorithm.mu=50")
    start = build.build_served(runs.config(BLACK), None).init(generator(0, Stream.INIT))
    away = {n: {k: (v - start[k]).norm() for k, v in runs.params(n).items()} for n in ("plain", "zero", "strong")}
    assert all(torch.equal(away["plain"][k], away["zero"][k]) for k in start)
    assert sum(away["strong"].values()) < sum(away["plain"].values())


def test_classes_can_come_from_a_file(runs):
    path = runs.folder / "classes.npy"
    np.save(path, np.random.default_rng(0).normal(size=(10, 64)))
    result = runs.local("named", BLACK, f"head.embeddings={path}", "federation.rounds=1")[-1]["result"]
    assert result["final"]["accuracy"] < 0.4  # the file's classes mean nothing
    assert len(build_data(runs.config(BLACK, f"head.embeddings={path}")).public) == 0


def test_classes_can_lie_in_the_space_of_the_models_own_head(runs):
    """For CLIP that is the joint space, where embeddings of texts lie."""
    path = runs.folder / "texts.npy"
    np.save(path, np.random.default_rng(0).normal(size=(10, 1000)))
    joint = (BLACK, "head.input=logits", "federation.rounds=1")
    named = runs.local("named", *joint, f"head.embeddings={path}")[-1]["result"]
    assert named["final"]["accuracy"] < 0.4  # the file's classes mean nothing
    shown = runs.local("shown", *joint)[-1]["result"]
    assert shown["final"]["accuracy"] > named["final"]["accuracy"]


EMBEDDINGS = "head.embeddings=64.npy"
BAD = {
    "gradients for Fed-BBPT": ([BLACK, "local.optimizer=adam"], "local.optimizer: 'adam' does not go with"),
    "a zeroth order for prompts": (["algorithm.name=fedavg", "local.optimizer=spsa"], "local.optimizer: 'spsa' asks"),
    "a head to train": ([BLACK, "head.kind=mlp"], "local.optimizer: 'spsa-gc' asks"),
    "prototypes for prompts": (["algorithm.name=fedavg", "head.kind=prototypes"], "head.kind: 'prototypes' goes with"),
    "personal prototypes": ([BLACK, "head.personal=true"], "head.personal: true needs"),
    "embeddings of features": ([BLACK, EMBEDDINGS, "head.input=logits"], "head.input=features reads 64)"),
    "embeddings of texts": ([BLACK, "head.embeddings=1000.npy"], "head.input=logits reads 1000)"),
    "no budget": ([BLACK, "blackbox.budget=0"], "blackbox.budget: found 0"),
    "two budgets": ([BLACK, "blackbox.budget=9", "blackbox.address=http://x"], "blackbox.budget: 9 does not go with"),
    "too many shots": ([BLACK, "head.shots=400"], "head.shots: 400, and class"),
    "no such file": ([BLACK, "head.embeddings=nowhere.npy"], "nowhere.npy (is missing)"),
    "nobody there": ([BLACK, "blackbox.address=http://127.0.0.1:9"], "blackbox.address: no service at"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_one_line(runs, capsys, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for width in (64, 1000):
        np.save(f"{width}.npy", np.ones((10, width)))
    overrides, named = case
    with pytest.raises(SystemExit) as end:
        main.main([*runs.command("run", *overrides)[3:], "--local"])
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.count("\n") == 1
    assert named in line


def test_a_head_that_is_left_out_is_the_kinds_own():
    assert load(None, [BLACK]).head.kind == "prototypes"
    assert load(None, ["algorithm.name=fedavg", VISUAL]).head.kind == "prototypes"
    assert load(None, ["algorithm.name=fedavg"]).head.kind == "mlp"
    with pytest.raises(InputError, match=r"head\.kind"):
        load(None, ["head.kind=prototypes"])
