"""FedOpt's servers against rounds by hand, FedAvg as a special case, and what survives a checkpoint."""

import numpy as np
import pytest
import torch
from by_hand import (
    SIZES,
    WEIGHT,
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

from fedprompt.client.tasks import Update

COHORTS = [[0, 2, 4, 5], [1, 2, 3], [0, 3, 5]]
BETA1, BETA2, TAU, SERVER_LR = 0.8, 0.95, 0.01, 0.05
SERVERS = ("adam", "yogi", "adagrad", "momentum", "sgd")


def next_v(server, v, d):
    """v_t of the adaptive servers."""
    if server == "adagrad":
        return v + d**2
    if server == "yogi":
        return v - (1 - BETA2) * d**2 * np.sign(v - d**2)
    return BETA2 * v + (1 - BETA2) * d**2


def numpy_fedopt(start, server, form):
    """Algorithm 2 in the paper's symbols: after every round x and the clients' plain average."""
    x, average = start, start
    m, v = combined(np.zeros_like, x), combined(lambda w: np.full_like(w, TAU**2), x)
    for round, cohort in enumerate(COHORTS, start=1):
        sent = average if form == "reference" else x
        ends = [walk(sent, client, round, sgd_step)[0] for client in cohort]
        average = mean(ends, [SIZES[client] for client in cohort])
        delta = combined(np.subtract, average, x)
        if server == "sgd":
            move = delta
        elif server == "momentum":
            m = move = combined(lambda m, d: BETA1 * m + d, m, delta)
        else:
            m = combined(lambda m, d: BETA1 * m + (1 - BETA1) * d, m, delta)
            v = combined(lambda v, d: next_v(server, v, d), v, delta)
            move = combined(lambda m, v: m / (np.sqrt(v) + TAU), m, v)
        x = combined(lambda w, d: w + SERVER_LR * d, x, move)
        yield x, average


def fedopt(server, form="paper", **settings):
    moments = {"server_lr": SERVER_LR, "beta1": BETA1, "beta2": BETA2, "tau": TAU, **settings}
    return make("fedopt", server=server, form=form, **moments)


@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("server", SERVERS)
def test_three_rounds_equal_the_algorithm_in_float64(make_model, server, form):
    model, algorithm = linear(make_model), fedopt(server, form)
    state = algorithm.init(start_of(model), None)
    expected = numpy_fedopt(arrays(state.params), server, form)
    for round, (cohort, (x, average)) in enumerate(zip(COHORTS, expected, strict=True), start=1):
        state, _ = play(algorithm, model, state, cohort, round)
        assert_near(state.params, x)
        assert_near(algorithm.broadcast(state, 1), average if form == "reference" else x)


def test_no_two_servers_do_the_same(make_model):
    ends = [list(numpy_fedopt(arrays(start_of(linear(make_model))), server, "paper"))[-1][0] for server in SERVERS]
    for i, first in enumerate(ends):
        assert all(np.abs(first[WEIGHT] - other[WEIGHT]).max() > 1e-4 for other in ends[i + 1 :])


def test_sgd_with_a_rate_of_one_is_fedavg(make_model):
    model, ends = linear(make_model), []
    for algorithm in (fedopt("sgd", server_lr=1.0), make("fedavg")):
        state = algorithm.init(start_of(model), None)
        for round, cohort in enumerate(COHORTS, start=1):
            state, _ = play(algorithm, model, state, cohort, round)
        ends.append(state.params)
    assert_near(ends[0], arrays(ends[1]), atol=1e-12)


def two_tensors(prompt, head):
    return {"prompt": torch.tensor([[prompt]]), "head.1.bias": torch.tensor([head])}


def moved(client, samples, params):
    return Update(client, samples, 1, params, selected=None, loss=0.0)


def test_yogi_takes_back_from_v_where_adam_and_adagrad_cannot():
    """After a large move v is above Δ² and shrinks by a share of Δ²; below it, v grows by as much."""
    square = torch.tensor([4.0])
    for v, expected in ((9.0, 9 - 0.05 * 4), (1.0, 1 + 0.05 * 4)):
        _, after, _ = fedopt("yogi")._move(torch.zeros(1), torch.tensor([v]), square.sqrt())
        assert after.item() == pytest.approx(expected)


def test_moments_start_at_zero_and_tau_squared_for_all_that_travels():
    state = fedopt("adam").init(two_tensors(3.0, 4.0), None)
    assert all(not value.any() for value in state.memory["first"].values())
    assert [value.item() for value in state.memory["second"].values()] == pytest.approx([TAU**2] * 2)
    personal = make("fedopt", {"personal_head": True}).init(two_tensors(3.0, 4.0), None)
    assert personal.memory["first"].keys() == personal.memory["second"].keys() == {"prompt"}


@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("server", ["adam", "sgd"])
def test_personal_heads_stay_with_their_client_and_the_server_holds_their_plain_mean(server, form):
    algorithm = make("fedopt", {"personal_head": True}, server=server, form=form)
    state = algorithm.init(two_tensors(0.0, 7.0), None)
    updates = [moved(1, 10, two_tensors(1.0, -3.0)), moved(4, 30, two_tensors(5.0, 1.0))]
    state, _ = algorithm.aggregate(state, updates, None)
    heads = {client: algorithm.broadcast(state, client)["head.1.bias"].item() for client in (1, 4, 2)}
    assert heads == {1: -3.0, 4: 1.0, 2: 7.0}
    assert state.params["head.1.bias"].item() == 0.0
    prompts = {algorithm.broadcast(state, client)["prompt"].item() for client in (1, 4, 2)}
    assert prompts == {4.0 if form == "reference" else state.params["prompt"].item()}
    assert 0 < state.params["prompt"].item() < 4  # a small step towards the mean


@pytest.mark.runs
def test_the_published_codes_form_trains_as_fedavg_and_scores_the_servers_model(tmp_path):
    rate = "algorithm.server_lr=0.003"
    plain_records, plain = tiny_run(tmp_path / "a", "algorithm.name=fedavg")
    records, state = tiny_run(tmp_path / "b", "algorithm.name=fedopt", "algorithm.form=reference", rate)
    assert same(state.memory["average"], plain.params)
    assert not same(state.params, plain.params)
    assert [record["train"] for record in records[1:-1]] == [record["train"] for record in plain_records[1:-1]]
    assert records[2]["validation"]["loss"] != plain_records[2]["validation"]["loss"]
    assert records[2]["communication"] == plain_records[2]["communication"]


@pytest.mark.runs
@pytest.mark.parametrize("form", ["paper", "reference"])
def test_moments_survive_a_checkpoint(tmp_path, form):
    method = ("algorithm.name=fedopt", "algorithm.server=yogi", f"algorithm.form={form}")
    whole_records, whole = tiny_run(tmp_path / "whole", *method, "federation.rounds=3")
    tiny_run(tmp_path / "halves", *method, "federation.rounds=2")
    rest, resumed = tiny_run(tmp_path / "halves", *method, "federation.rounds=3")
    assert rest[0]["round"] == 3
    assert same(resumed.params, whole.params)
    assert resumed.memory.keys() == whole.memory.keys() >= {"first", "second"}
    for part, params in whole.memory.items():
        assert same(resumed.memory[part], params)
    assert rest[0]["test"] == whole_records[3]["test"]
