"""Servers that remember: FedMem and MIFA against rounds by hand, and a pool that moves under what is remembered."""

import numpy as np
import pytest
import torch
from by_hand import (
    RATE,
    SIZES,
    arrays,
    assert_near,
    combined,
    linear,
    make,
    mean,
    play,
    same,
    start_of,
    tiny_run,
    walk,
)

from fedprompt.algorithms.base import State
from fedprompt.algorithms.memory import NEWEST, heard
from fedprompt.algorithms.pfpt_mem import moved
from fedprompt.client.tasks import Update

COHORTS = [[1, 3], [0, 1, 4], [2, 5], [0, 3]]


def sgd(params, grads, opens_epoch):
    return combined(lambda w, g: w - RATE * g, params, grads)


def after(x, client, round):
    """Where a client's local training ends in numpy."""
    return walk(x, client, round, sgd)[0]


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


@pytest.mark.parametrize("name", ["fedmem", "pfpt-mem"])
def test_where_everybody_always_takes_part_memory_changes_nothing(name):
    pool, rng = torch.randn(6, 8, dtype=torch.float64), np.random.default_rng(0)
    other = {"fedmem": "fedavg", "pfpt-mem": "pfpt-map"}[name]
    states = {method: State({"pool": pool, "head.1.bias": torch.zeros(2)}) for method in (name, other)}
    for round in range(3):
        for method, state in states.items():
            sent = [updated(client, state, round, used=range(len(state.params["pool"]))) for client in range(4)]
            states[method] = make(method).aggregate(state, sent, rng)[0]
        assert same(states[name].params, states[other].params)


def test_what_is_remembered_is_told_with_its_age():
    state = State({"pool": torch.zeros(2, 3)})
    told = []
    for cohort in ([0, 3], [3, 5], [1]):
        state, newest, metrics = heard(state, [updated(client, state, 0, used=[0]) for client in cohort])
        told.append(([update.client for update in newest], metrics["remembered"], metrics["age"]))
    assert told == [([0, 3], 2, 0), ([0, 3, 5], 3, pytest.approx(1 / 3)), ([0, 1, 3, 5], 4, pytest.approx(4 / 4))]


def updated(client, state, round, used, far=False):
    """An update whose pool is a little way off, and where it says so somewhere else with its last prompt."""
    pool = state.params["pool"]
    noise = np.random.default_rng([client, round]).normal(size=tuple(pool.shape))
    pool = pool + 0.01 * torch.from_numpy(noise).to(pool)
    if far:
        pool[-1] = torch.randn(pool.shape[1], generator=torch.Generator().manual_seed(1), dtype=pool.dtype)
    chosen = torch.tensor([i in used for i in range(len(pool))])
    return Update(client, 10 + client, 1, {"pool": pool, "head.1.bias": torch.full((2,), float(client))}, chosen, 0.0)


def test_a_prompt_that_one_cohort_does_not_use_stays_while_somebody_was_last_heard_using_it():
    state, rng = State({"pool": torch.randn(4, 64, dtype=torch.float64)}), np.random.default_rng(0)
    algorithm = make("pfpt-mem")
    sizes = []
    for client, used in ((0, (0, 1, 2)), (1, (1,)), (0, (1, 2))):
        sent = [updated(client, state, client, used=used)]
        state, metrics = algorithm.aggregate(state, sent, rng)
        sizes.append((metrics["pool_size"], metrics["remembered"]))
    assert sizes == [(3, 1), (3, 2), (2, 2)]  # the last prompt at once, the first when its only user lets it go


def test_what_is_remembered_stands_where_it_was_matched_to_when_the_pool_changes():
    algorithm, rng = make("pfpt-mem"), np.random.default_rng(0)
    start = torch.randn(4, 64, dtype=torch.float64)
    state = State({"pool": start})
    first = [updated(client, state, 0, used=(1, 2, 3)) for client in range(3)]
    state, _ = algorithm.aggregate(state, first, rng)
    assert len(state.params["pool"]) == 3
    second = [updated(3, state, 1, used=(0, 1, 2), far=True)]
    state, metrics = algorithm.aggregate(state, second, rng)
    assert (metrics["opened"], metrics["closed"], metrics["pool_size"]) == (1, 0, 4)
    entries = state.memory[NEWEST]
    for client in range(3):
        own = entries[str(client)]["params"]["pool"]
        torch.testing.assert_close(own[:3], first[client].params["pool"][1:], rtol=0, atol=0)
        assert own[3].isnan().all()  # the new prompt is none of its own
        assert entries[str(client)]["selected"].tolist() == [True, True, True, False]
    newcomer = entries["3"]["params"]["pool"]
    torch.testing.assert_close(newcomer[[0, 1, 3]], second[0].params["pool"], rtol=0, atol=0)
    assert newcomer[2].isnan().all()
    third = [updated(0, state, 2, used=(0, 1, 2, 3))]
    state, _ = algorithm.aggregate(state, third, rng)  # where nobody has a version, the pool's own stands in
    assert torch.isfinite(state.params["pool"]).all()


def test_places_of_what_was_dropped_are_left_out():
    values, places = torch.arange(6.0).view(3, 2), torch.tensor([2, -1, 0])
    assert moved(values, places, 3, fill=-1.0).tolist() == [[4, 5], [-1, -1], [0, 1]]


@pytest.mark.parametrize("name", ["fedmem", "mifa", "pfpt-mem"])
def test_a_resumed_run_remembers(tmp_path, name):
    whole, state = tiny_run(tmp_path / "whole", f"algorithm.name={name}", "federation.rounds=4")
    tiny_run(tmp_path / "parts", f"algorithm.name={name}", "federation.rounds=2")
    parts, resumed = tiny_run(tmp_path / "parts", f"algorithm.name={name}", "federation.rounds=4")
    assert same(state.params, resumed.params)
    assert whole[-1]["result"]["final"] == parts[-1]["result"]["final"]
    assert whole[4]["aggregate"]["remembered"] == len(resumed.memory[NEWEST])
