"""Clients that drop out, come too late or diverge: who it is, what is recorded, and that nothing else changes."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedprompt.config.schema import FederationSection
from fedprompt.errors import RunFailed
from fedprompt.models.params import size_in_bytes
from fedprompt.runtime import worker
from fedprompt.runtime.attendance import attendance, log_slowness
from fedprompt.runtime.pool import InProcessPool

SOME = ("federation.dropout=0.4", "federation.deadline=1.5", "federation.cohort=6")
NOBODY = "federation.dropout=0.999999"
AVERAGE = "algorithm.name=fedavg"


def parts(steps, round=1, seed=0, **federation):
    there = attendance(FederationSection(**federation), seed, round, steps)
    return there.present, there.dropped, there.late


# --- who is absent


def test_by_default_everybody_answers_in_time():
    assert parts({4: 1, 1: 1000, 7: 3}) == ([1, 4, 7], [], [])


def test_clients_drop_out_with_the_given_probability():
    dropped = [len(parts(dict.fromkeys(range(10), 5), round, dropout=0.3)[1]) for round in range(300)]
    assert sum(dropped) / 3000 == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 3000))
    assert len(set(dropped)) > 4


def test_who_drops_out_depends_on_seed_round_and_client_and_on_nobody_else():
    everybody = dict.fromkeys(range(50), 5)
    dropped = parts(everybody, dropout=0.5)[1]
    few = dict.fromkeys(range(20), 9)
    assert parts(few, dropout=0.5, deadline=1.0)[1] == [client for client in dropped if client < 20]
    assert dropped != parts(everybody, round=2, dropout=0.5)[1]
    assert dropped != parts(everybody, seed=1, dropout=0.5)[1]


def test_with_equal_speeds_those_are_late_whose_steps_exceed_the_deadline_in_medians():
    steps = {0: 10, 1: 20, 2: 30, 3: 31, 4: 5}  # median 20
    assert parts(steps, deadline=1.5, speed_spread=0) == ([0, 1, 2, 4], [], [3])
    assert parts(steps, deadline=0.4, speed_spread=0) == ([4], [], [0, 1, 2, 3])


def test_with_equal_work_those_are_late_who_are_slow_in_every_round():
    steps = dict.fromkeys(range(30), 7)
    late = parts(steps, deadline=1.3, speed_spread=0.8)[2]
    slow = {client: math.exp(log_slowness(0, client, 0.8)) for client in steps}
    assert late == [client for client, time in slow.items() if time > 1.3 * np.median(list(slow.values()))]
    assert 3 < len(late) < 27
    assert parts(steps, round=2, deadline=1.3, speed_spread=0.8)[2] == late
    assert parts(steps, seed=1, deadline=1.3, speed_spread=0.8)[2] != late


def test_slowness_is_log_normal_with_median_1_and_the_given_spread():
    logarithms = np.array([log_slowness(3, client, 0.7) for client in range(2000)])
    assert logarithms.mean() == pytest.approx(0, abs=0.05)
    assert logarithms.std() == pytest.approx(0.7, abs=0.04)


@pytest.mark.parametrize("spread", [500, 1e6, 1e150])
@pytest.mark.parametrize("clients", [1, 2, 7, 8])
def test_however_far_speeds_are_apart_the_slow_are_late_and_the_fast_are_not(spread, clients):
    steps = dict.fromkeys(range(clients), 10**6)
    logs = sorted((log_slowness(0, client, spread), client) for client in steps)
    federation = SimpleNamespace(dropout=0, deadline=1.0, speed_spread=spread)  # more than the configuration allows
    there = attendance(federation, 0, 1, steps)
    present, late = there.present, there.late
    assert late == sorted(client for _, client in logs[(clients + 1) // 2 :])
    assert sorted(present + late) == list(steps)


def test_a_cohort_of_nobody_is_divided_into_nobody():
    assert parts({}, deadline=0.5, dropout=0.5) == ([], [], [])


def test_a_client_is_absent_for_one_reason_only_and_nobody_is_lost():
    for round in range(20):
        present, dropped, late = parts({c: 1 + c for c in range(12)}, round, dropout=0.5, deadline=0.8)
        assert sorted(present + dropped + late) == list(range(12))


# --- what it means for a run


@pytest.fixture(scope="module")
def absent(shared_runs):
    """Records of a run in which some drop out and some are late, and whom its workers trained."""
    train, trained = InProcessPool.train, []

    def listening(self, round, groups):
        trained.append(sorted(task.client for tasks in groups for task in tasks))
        return train(self, round, groups)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(InProcessPool, "train", listening)
        return shared_runs.local("absent", AVERAGE, *SOME), trained


def test_the_absent_are_recorded_and_train_nothing(absent):
    records, trained = absent
    rounds = records[1:-1]
    for record, clients in zip(rounds, trained, strict=True):
        gone = record["dropped"] + record["late"]
        assert sorted(gone + clients) == record["cohort"]
        assert not set(record["dropped"]) & set(record["late"])
        assert record["left_out"] == []
    result = records[-1]["result"]
    assert result["dropped"] == sum(len(record["dropped"]) for record in rounds) > 0
    assert result["late"] == sum(len(record["late"]) for record in rounds) > 0
    assert result["left_out"] == 0


def test_the_absent_cost_bytes_on_the_way_to_them_only(absent, shared_runs):
    size = size_in_bytes(shared_runs.params("absent"))
    for record, clients in zip(absent[0][1:-1], absent[1], strict=True):
        assert record["communication"] == {"up_bytes": len(clients) * size, "down_bytes": 6 * size}


def test_a_run_with_absent_clients_goes_on_as_if_it_never_had_been_stopped(absent, runs, shared_runs, same_params):
    runs.local("run", AVERAGE, *SOME, "federation.rounds=1")
    runs.local("run", AVERAGE, *SOME)
    assert same_params(runs.params("run"), shared_runs.params("absent"))
    assert runs.lines("run") == shared_runs.lines("absent")


@pytest.mark.ray
@pytest.mark.long
def test_the_same_clients_are_absent_on_ray(absent, shared_runs, same_params):
    pytest.importorskip("ray")
    from fedprompt.runtime.ray.on_ray import run_on_ray

    config = shared_runs.config(AVERAGE, *SOME, "runtime.workers=1")
    list(run_on_ray(config, shared_runs.folder / "ray"))
    assert same_params(shared_runs.params("ray"), shared_runs.params("absent"))
    assert shared_runs.lines("ray") == shared_runs.lines("absent")


def test_what_the_absent_keep_stays_as_it_was(runs):
    records = runs.local("own", AVERAGE, "head.personal=true", *SOME)
    answered = {c for r in records[1:-1] for c in set(r["cohort"]) - set(r["dropped"]) - set(r["late"])}
    assert 0 < len(answered) < 6
    assert set(runs.state("own").clients) == answered


@pytest.mark.parametrize("method", ["pfpt", "fedavg", "scaffold", "fedopt", "gmm", "pfedpg"])
def test_a_round_without_any_answer_passes_and_changes_nothing(runs, same_params, method):
    records = runs.local("empty", f"algorithm.name={method}", NOBODY, "federation.rounds=2")
    start, *rounds = records[:-1]
    for record in rounds:
        assert record["dropped"] == record["cohort"]
        assert record["train"] == {"loss": None}
        assert record["communication"]["up_bytes"] == 0
        assert record["communication"]["down_bytes"] > 0
        assert any("the state stays as it was" in line for line in record["warnings"])
        assert record["test"] == start["test"]
    runs.local("start", f"algorithm.name={method}", NOBODY, "federation.rounds=1")
    assert same_params(runs.params("empty"), runs.params("start"))
    assert json.loads((runs.folder / "empty" / "metrics.jsonl").read_text().splitlines()[2])["train"]["loss"] is None


# --- divergence


@pytest.fixture
def spoil(monkeypatch):
    """Let the updates of the given clients come back with params that are not finite."""
    train = worker.train_group

    def of(clients):
        def spoiled(update):
            params = {**update.params, "head.2.bias": update.params["head.2.bias"] * float("nan")}
            return dataclasses.replace(update, params=params) if update.client in clients else update

        monkeypatch.setattr(worker, "train_group", lambda *given: [spoiled(update) for update in train(*given)])

    return of


def test_clients_that_diverge_are_left_out_named_and_counted(runs, spoil):
    spoil({1, 4})
    records = runs.local("run", AVERAGE, "federation.cohort=6", "federation.rounds=2")
    assert [line["left_out"] for line in runs.lines("run")[1:]] == [[1, 4], [1, 4]]
    assert records[1]["warnings"] == ["left out clients [1, 4]: their params are not finite"]
    assert records[-1]["result"]["left_out"] == 4
    assert records[1]["communication"]["up_bytes"] == records[1]["communication"]["down_bytes"]  # they did answer
    assert all(torch.isfinite(value).all() for value in runs.params("run").values())


@pytest.mark.parametrize(
    ("diverged", "allowed", "fails"), [(3, 0.5, False), (4, 0.5, True), (1, 0, True), (6, 1, False)]
)
def test_the_run_stops_when_more_diverge_than_may(runs, spoil, diverged, allowed, fails):
    spoil(set(range(diverged)))
    options = (AVERAGE, "federation.cohort=6", "federation.rounds=1", f"federation.max_lost={allowed}", "local.lr=0.25")
    if not fails:
        assert runs.local("run", *options)[1]["left_out"] == list(range(diverged))
        return
    with pytest.raises(RunFailed) as caught:
        runs.local("run", *options)
    told = str(caught.value)
    for part in ("round 1:", str(list(range(diverged))), f"{diverged} of 6", "local.lr = 0.25", "federation.max_lost"):
        assert part in told
    assert "\n" not in told
    assert [line["round"] for line in runs.lines("run")] == [0]


def test_the_share_that_diverged_is_one_of_those_who_answered(runs, spoil):
    spoil({0, 1, 2, 3, 4, 5})
    with pytest.raises(RunFailed, match=r"(\d) of \1 that answered"):
        runs.local("run", AVERAGE, *SOME)


def test_after_divergence_a_run_may_go_on_with_more_tolerance(runs, spoil):
    from fedprompt.cli import main
    from fedprompt.runtime.run import new_run

    options = (AVERAGE, "federation.cohort=6", "federation.rounds=2")
    spoil({0, 1, 2, 3})
    with new_run(runs.folder / "run", runs.config(*options), overwrite=False), pytest.raises(RunFailed):
        runs.local("run", *options)
    main.main(["run", "--resume", "--local", "--output", str(runs.folder / "run"), "federation.max_lost=0.7"])
    assert [line.get("left_out") for line in runs.lines("run")] == [None, [0, 1, 2, 3], [0, 1, 2, 3]]
