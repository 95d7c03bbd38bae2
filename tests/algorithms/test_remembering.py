"""Servers that remember: FedMem and MIFA against rounds by hand, and heads that are remembered next to a pool."""

import numpy as np
import pytest
import torch
from by_hand import (
    SIZES,
    arrays,
    assert_near,
    combined,
    linear,
    make,
    mean,
    play,
    same,
    sgd_step,
    start_of,
    tiny_run,
    walk,
)

from fedprompt.algorithms.base import State
from fedprompt.algorithms.memory import NEWEST, heard
from fedprompt.client.tasks import Update
from fedprompt.errors import InputError

COHORTS = [[1, 3], [0, 1, 4], [2, 5], [0, 3]]


def after(x, client, round):
    """Where a client's local training ends in numpy."""
    return walk(x, client, round, sgd_step)[0]


def test_fedmem_averages_the_newest_params_of_all_that_were_heard_of(make_model):
    model, algorithm = linear(make_model), make("fedmem")
    state = algorithm.init(start_of(model), None)
    x, newest = arrays(state.params), {}
    for round, cohort in enumerate(COHORTS, start=1):
        state, _ = play(algorithm, model, state, cohort, round)
        newest |= {client: after(x, client, round) for client in cohort}
        x = mean([newest[client] for client in sorted(newest)], [SIZES[client] for client in sorted(newest)])
        assert_near(state.params, x)


@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_mifa_steps_along_the_mean_of_everybodys_newest_move(make_model, rate):
    model, algorithm = linear(make_model), make("mifa", server_lr=rate)
    state = algorithm.init(start_of(model), None)
    x, moves = arrays(state.params), {}
    for round, cohort in enumerate(COHORTS, start=1):
        state, _ = play(algorithm, model, state, cohort, round)
        moves |= {client: combined(np.subtract, after(x, client, round), x) for client in cohort}
        step = mean([moves[client] for client in sorted(moves)], [1] * len(moves))
        x = combined(lambda w, g: w + rate * g, x, step)
        assert_near(state.params, x)


def test_with_remembered_heads_everything_else_follows_the_cohort_alone():
    algorithm, state = (
        make("fedmem", remembers="head"),
        State({"pool": torch.zeros(2, 3), "head.1.bias": torch.zeros(2)}),
    )
    sets = {0: torch.full((2, 3), 1.0), 1: torch.full((2, 3), 4.0), 2: torch.full((2, 3), 10.0)}
    for cohort in ([0, 1], [2]):
        sent = [
            Update(client, 10, 1, {"pool": sets[client], "head.1.bias": sets[client][:, 0]}, None, 0.0)
            for client in cohort
        ]
        state, metrics = algorithm.aggregate(state, sent, np.random.default_rng(0))
    assert state.params["pool"].unique().tolist() == [10.0]
    assert state.params["head.1.bias"].tolist() == [5.0, 5.0]
    assert metrics["remembered"] == 3
    assert all(entry["params"].keys() == {"head.1.bias"} for entry in state.memory[NEWEST].values())


def test_a_head_that_is_not_there_cannot_be_remembered():
    with pytest.raises(InputError, match=r"algorithm\.remembers: 'head', but .* allowed: all"):
        make("fedmem", remembers="head").init({"visual.0.weight": torch.ones(2)}, None)


def test_a_pool_with_remembered_heads_is_that_of_the_closed_form():
    start = State({"pool": torch.randn(6, 8, dtype=torch.float64), "head.1.bias": torch.zeros(2, dtype=torch.float64)})
    states, heads = {"pfpt-map": start, "pfpt-mem": start}, []
    algorithms = {"pfpt-map": make("pfpt-map"), "pfpt-mem": make("pfpt-mem")}
    for round, cohort in enumerate(([0, 1], [2, 3])):
        for name, state in states.items():
            sent = [updated(client, state, round) for client in cohort]
            states[name] = algorithms[name].aggregate(state, sent, np.random.default_rng(0))[0]
        heads += [(10.0 + client) * client for client in cohort]
        assert torch.equal(states["pfpt-mem"].params["pool"], states["pfpt-map"].params["pool"])
        expected = sum(heads) / sum(10.0 + client for client in range(len(heads)))
        assert states["pfpt-mem"].params["head.1.bias"].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("name", ["fedmem", "pfpt-mem"])
def test_where_everybody_always_takes_part_memory_changes_nothing(name):
    pool, rng = torch.randn(6, 8, dtype=torch.float64), np.random.default_rng(0)
    other = {"fedmem": "fedavg", "pfpt-mem": "pfpt-map"}[name]
    states = {method: State({"pool": pool, "head.1.bias": torch.zeros(2)}) for method in (name, other)}
    for round in range(3):
        for method, state in states.items():
            sent = [updated(client, state, round) for client in range(4)]
            states[method] = make(method).aggregate(state, sent, rng)[0]
        assert same(states[name].params, states[other].params)


def test_what_is_remembered_is_told_with_its_age():
    state = State({"pool": torch.zeros(2, 3)})
    told = []
    for cohort in ([0, 3], [3, 5], [1]):
        state, newest, metrics = heard(state, [updated(client, state, 0) for client in cohort])
        told.append(([update.client for update in newest], metrics["remembered"], metrics["age"]))
    assert told == [([0, 3], 2, 0), ([0, 3, 5], 3, pytest.approx(1 / 3)), ([0, 1, 3, 5], 4, pytest.approx(4 / 4))]


def updated(client, state, round):
    """An update whose pool is a little way off."""
    pool = state.params["pool"]
    noise = np.random.default_rng([client, round]).normal(size=tuple(pool.shape))
    pool = pool + 0.01 * torch.from_numpy(noise).to(pool)
    used = torch.ones(len(pool), dtype=torch.bool)
    return Update(client, 10 + client, 1, {"pool": pool, "head.1.bias": torch.full((2,), float(client))}, used, 0.0)


@pytest.mark.runs
@pytest.mark.parametrize("name", ["fedmem", "fedmem algorithm.remembers=head", "mifa", "pfpt-mem"])
def test_a_resumed_run_remembers(tmp_path, name):
    method = f"algorithm.name={name}".split()
    whole, state = tiny_run(tmp_path / "whole", *method, "federation.rounds=4")
    tiny_run(tmp_path / "parts", *method, "federation.rounds=2")
    parts, resumed = tiny_run(tmp_path / "parts", *method, "federation.rounds=4")
    assert same(state.params, resumed.params)
    assert whole[-1]["result"]["final"] == parts[-1]["result"]["final"]
    assert whole[4]["aggregate"]["remembered"] == len(resumed.memory[NEWEST])
