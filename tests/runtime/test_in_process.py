"""A whole federation in one process: what a round does, what it records, and what the result says."""

import json
import subprocess
import sys

import pytest
import torch

from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.models.params import size_in_bytes
from fedprompt.runtime import run as running
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.folders.folders import mark
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.worker import Worker
from fedprompt.seeding import Stream, generator

SCORES = {"accuracy", "balanced_accuracy", "macro_f1", "loss", "validation_accuracy", "round"}


@pytest.fixture(scope="module")
def pfpt(shared_runs):
    """Records of one run of PFPT, which several tests look at."""
    return shared_runs.local("pfpt")


def test_every_round_is_recorded_with_what_happened_in_it(pfpt, shared_runs):
    start, *rounds = pfpt[:-1]
    assert start.keys() == {"round", "aggregate", "validation", "test", "clients", "seconds"}
    assert start["aggregate"] == {"pool_size": 6.0}
    assert [record["round"] for record in rounds] == [1, 2, 3]
    for record in rounds:
        assert record.keys() >= {"cohort", "train", "aggregate", "communication", "seconds", "warnings", "test"}
        assert record["aggregate"].keys() >= {"pool_size", "drift_relative", "margin", "sigma_min", "changed"}
        assert record["seconds"].keys() == {"train", "aggregate", "evaluate", "total"}
    assert [line["round"] for line in shared_runs.lines("pfpt")] == [0, 1, 2, 3]


def test_the_result_has_the_keys_that_users_rely_on(pfpt, shared_runs):
    result = json.loads((shared_runs.folder / "pfpt" / "result.json").read_text())
    assert result == json.loads(json.dumps(pfpt[-1]["result"]))
    assert (result["algorithm"], result["dataset"], result["backbone"]) == ("pfpt", "digits", "test_vit")
    assert (result["seed"], result["rounds"]) == (0, 3)
    for part in ("final", "best", "last10"):
        assert result[part].keys() >= SCORES
    assert result["clients"].keys() == {"mean_accuracy", "worst_decile_accuracy", "accuracies"}
    assert result["pool_size"].keys() == {"first", "last"}
    assert result["communication"].keys() == {"up_bytes", "down_bytes", "full_model_bytes"}
    assert result["seconds"].keys() == {"train", "aggregate", "evaluate", "total"}
    assert result["versions"].keys() >= {"fedprompt", "torch", "python"}


def test_the_result_sums_up_the_rounds(pfpt):
    rounds, result = pfpt[1:-1], pfpt[-1]["result"]
    accuracies = [record["test"]["accuracy"] for record in rounds]
    on_validation = [record["validation"]["accuracy"] for record in rounds]
    best = on_validation.index(max(on_validation))
    assert result["final"]["accuracy"] == accuracies[-1]
    assert (result["best"]["accuracy"], result["best"]["round"]) == (accuracies[best], best + 1)
    assert result["last10"]["accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert result["pool_size"] == {"first": 6, "last": rounds[-1]["aggregate"]["pool_size"]}
    for way in ("up_bytes", "down_bytes"):
        assert result["communication"][way] == sum(record["communication"][way] for record in rounds)


def test_cohorts_are_drawn_without_replacement_and_again_in_the_same_way(runs):
    algorithm = build_algorithm(runs.config("federation.clients=20", "federation.cohort=15"))
    drawn, again = ([algorithm.cohort(None, r, generator(0, Stream.COHORT, r)) for r in range(1, 6)] for _ in range(2))
    assert drawn == again
    assert all(len(set(cohort)) == 15 and set(cohort) <= set(range(20)) for cohort in drawn)
    assert all(cohort == sorted(cohort) for cohort in drawn)
    assert len({tuple(cohort) for cohort in drawn}) == 5


def test_the_same_command_twice_gives_the_same_bits(pfpt, shared_runs, same_params):
    again = shared_runs.local("again")
    assert same_params(shared_runs.params("pfpt"), shared_runs.params("again"))
    assert shared_runs.lines("pfpt") == shared_runs.lines("again")
    assert again[-1]["result"]["final"] == pfpt[-1]["result"]["final"]


def test_groups_side_by_side_give_the_same_bits_as_one_after_the_other(shared_runs, same_params):
    for workers in (1, 3):
        shared_runs.local(f"workers-{workers}", f"runtime.workers={workers}", "runtime.group_size=1")
    assert same_params(shared_runs.params("workers-1"), shared_runs.params("workers-3"))
    assert shared_runs.lines("workers-1") == shared_runs.lines("workers-3")


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
def test_several_threads_in_one_product_give_the_same_bits_each_time(shared_runs, same_params, kind):
    for name in ("first", "second"):
        options = ("runtime.cpus_per_worker=2", "algorithm.name=fedavg", f"prompt.kind={kind}")
        shared_runs.local(f"{kind}-{name}", "federation.rounds=2", *options)
    assert same_params(shared_runs.params(f"{kind}-first"), shared_runs.params(f"{kind}-second"))


def test_another_seed_gives_another_run(pfpt, shared_runs):
    shared_runs.local("other", "seed=1", "federation.rounds=1")
    first, other = shared_runs.params("pfpt"), shared_runs.params("other")
    assert not torch.equal(first["head.1.weight"], other["head.1.weight"])


def test_groups_depend_on_the_configuration_alone_and_change_nothing_but_last_digits(pfpt, shared_runs):
    shared_runs.local("single", "runtime.group_size=1", "runtime.workers=2")
    whole, single = shared_runs.params("pfpt"), shared_runs.params("single")
    assert whole["pool"].shape == single["pool"].shape
    assert all(torch.allclose(whole[name], single[name], atol=1e-4) for name in whole)


def test_kept_tokens_change_nothing_but_last_digits(pfpt, shared_runs):
    shared_runs.local("uncached", "runtime.cache_mb=0")
    kept, anew = shared_runs.params("pfpt"), shared_runs.params("uncached")
    assert all(torch.allclose(kept[name], anew[name], atol=1e-4) for name in kept)


@pytest.mark.parametrize(("method", "up", "down"), [("fedavg", 1, 1), ("head", 1, 1), ("local", 0, 0)])
def test_bytes_are_those_of_the_tensors_that_travel(runs, method, up, down):
    records = runs.local(method, f"algorithm.name={method}", "federation.rounds=1")
    size = size_in_bytes(runs.params(method))
    head = 4 * (64 * 512 + 512 + 512 * 10 + 10)
    assert size == head + (10 * 64 * 4 if method != "head" else 0)  # 10 prompts of test_vit's width
    assert records[1]["communication"] == {"up_bytes": 3 * up * size, "down_bytes": 3 * down * size}


def test_the_full_model_goes_both_ways_for_every_client_of_every_cohort(pfpt, shared_runs):
    facts = InProcessPool(shared_runs.config(), build_data(shared_runs.config())).facts
    assert pfpt[-1]["result"]["communication"]["full_model_bytes"] == 2 * 3 * 3 * facts.full_model_bytes


def test_rounds_between_evaluations_are_not_scored_but_the_last_always_is(runs):
    records = runs.local("sparse", "federation.eval_every=2", "algorithm.name=head")
    assert [record["round"] for record in records[:-1] if "test" in record] == [0, 2, 3]
    assert records[-1]["result"]["last10"]["evaluations"] == 2


def test_a_run_with_means_of_groups_is_the_run_with_every_update(runs, monkeypatch):
    overrides = ("algorithm.name=fedavg", "federation.cohort=6", "runtime.group_size=3")
    runs.local("means", *overrides)
    groups, train = [], Worker.train
    monkeypatch.setattr(Worker, "train", lambda *given: groups.append(train(*given)) or groups[-1])
    monkeypatch.setattr(FedAvg, "needs_only_mean", False)
    runs.local("every", *overrides)
    assert {len(group) for group in groups} == {3}
    for mean, every in zip(runs.lines("means"), runs.lines("every"), strict=True):
        assert mean.get("communication") == every.get("communication")
        assert mean["test"]["loss"] == pytest.approx(every["test"]["loss"], abs=1e-4)
    for name, value in runs.params("every").items():
        torch.testing.assert_close(runs.params("means")[name], value, rtol=0, atol=1e-5)


def test_a_run_that_diverges_ends_with_code_1_and_one_line(runs, start_process):
    command = runs.command("diverged", "algorithm.name=fedavg", "local.lr=1e38", "local.optimizer=sgd", "--local")
    process = start_process(command)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert "not a number" in errors


def test_personal_heads_are_reported_beside_their_average(runs):
    result = runs.local("own", "head.personal=true", "federation.rounds=2")[-1]["result"]
    assert result["clients"].keys() >= {"own_head_global_accuracy", "averaged_head_global_accuracy"}
    assert result["clients"]["averaged_head_global_accuracy"] == result["final"]["accuracy"]


def test_a_new_run_refuses_a_folder_with_a_run_unless_it_may_overwrite(runs):
    config, output = runs.config(), runs.folder / "run"
    with running.new_run(output, config, overwrite=False):
        (output / "result.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run already"), running.new_run(output, config, overwrite=False):
        pass
    with running.new_run(output, config, overwrite=True):
        assert not (output / "result.json").exists()
    assert sorted(path.name for path in output.iterdir()) == [".fedprompt-run", "config.yaml"]


def fail_after_making(folder):
    folder.mkdir(exist_ok=True)
    raise InputError("no such data")


def test_a_run_that_cannot_begin_leaves_the_folder_as_it_was(runs):
    output = runs.folder / "run"
    folder = running.new_run(output, runs.config(), overwrite=False)
    with pytest.raises(InputError), folder:
        raise InputError("wrong")
    assert not output.exists()
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "round_000003.pt").write_text("precious")
    (output / "config.yaml").write_text("before")
    mark(output, "run")
    with pytest.raises(InputError, match="no such data"), running.new_run(output, runs.config(), overwrite=True):
        fail_after_making(output / "checkpoints")
    assert (output / "config.yaml").read_text() == "before"
    assert (output / "checkpoints" / "round_000003.pt").read_text() == "precious"
    assert sorted(path.name for path in output.iterdir()) == [".fedprompt-run", "checkpoints", "config.yaml"]


def test_another_runs_checkpoints_in_the_storage_are_never_taken_over(runs):
    runs.local("first", "federation.rounds=1")
    config = runs.config(f"runtime.storage={runs.folder / 'first' / 'checkpoints'}")
    with pytest.raises(InputError, match=r"runtime\.storage"), running.new_run(runs.folder / "new", config, True):
        pass


def test_what_runs_without_ray_never_imports_it(runs):
    program = f"""
import sys
import fedprompt, fedprompt.config.schema, fedprompt.client.train, fedprompt.algorithms.pfpt.pfpt, fedprompt.data
import fedprompt.models.model, fedprompt.tracking
assert "ray" not in sys.modules
from fedprompt.cli import main
main.main({runs.command("run", "federation.rounds=1", "--local")[3:]!r})
assert "ray" not in sys.modules, "a run in this process imported ray"
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
    assert (runs.folder / "run" / "result.json").exists()


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(running.default_output(load(None, ["algorithm.name=fedavg"])))
        folders[-1].mkdir(parents=True)
    assert len(set(folders)) == 3
