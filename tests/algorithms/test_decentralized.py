"""Methods without a server: rounds by hand, who is away, what is sent, how they are scored, and that runs repeat."""

import numpy as np
import pytest
import torch
from by_hand import (
    BIAS,
    RATE,
    SGD,
    arrays,
    assert_near,
    combined,
    examples_of,
    linear,
    make,
    play,
    same,
    sgd_step,
    start_of,
    tiny_run,
    walk,
)

from fedprompt.algorithms import registry
from fedprompt.algorithms.decentralized.base import KNOWN, PUBLIC, Decentralized
from fedprompt.algorithms.decentralized.graphs import make_links, metropolis
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.tasks import Training, Update
from fedprompt.client.train import train_group
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.models.params import size_in_bytes

METHODS = ("dpsgd", "dfedavg", "dfedavgm", "dfedsam", "dfedsam-mgs", "dpfpt")
CLIENTS = 6
EVERYBODY = list(range(CLIENTS))


def quick(method):
    return (f"algorithm.name={method}", *(("algorithm.sweeps=2",) if method == "dpfpt" else ()))


def ring():
    return metropolis(make_links("ring", CLIENTS, 4, np.random.default_rng(0)), CLIENTS).toarray()


def mixed(weights, models):
    return [combined(lambda *x, w=row: np.einsum("j,j...->...", w, np.stack(x)), *models) for row in weights]


def two_tensors(prompt, head):
    return {"prompt": torch.tensor([[prompt]]), BIAS: torch.tensor([head])}


def updates_of(values, clients=EVERYBODY):
    return [Update(c, 10 * c + 1, 1, two_tensors(values[c], -values[c]), None, 0.0) for c in clients]


def aggregated(method, updates, state=None, seed=0):
    state = state or method.init(two_tensors(0.0, 0.0), None)
    return method.aggregate(state, updates, np.random.default_rng(seed))


def prompts(method, state):
    return np.array([method.broadcast(state, client)["prompt"].item() for client in EVERYBODY])


# --- rounds


@pytest.mark.parametrize(("name", "gossip_steps"), [("dfedavg", 1), ("dfedsam-mgs", 3)])
def test_rounds_equal_local_sgd_and_the_product_with_w_in_float64(make_model, name, gossip_steps):
    model = linear(make_model)
    method = make(name, **({"gossip_steps": gossip_steps} if gossip_steps > 1 else {}))
    state = method.init(start_of(model), None)
    own = [arrays(state.params)] * CLIENTS
    for round in (1, 2):
        state, _ = play(method, model, state, EVERYBODY, round)  # plain gradients: SAM is the worker's to add
        own = [walk(own[i], i, round, sgd_step)[0] for i in EVERYBODY]
        for _ in range(gossip_steps):
            own = mixed(ring(), own)
        for client in EVERYBODY:
            assert_near(method.broadcast(state, client), own[client])
        assert_near(state.params, combined(lambda *x: np.mean(x, axis=0), *own))


def test_d_psgd_takes_one_step_a_round_whatever_the_epochs(make_model):
    model, method = linear(make_model), make("dpsgd")
    state = method.init(start_of(model), None)
    for epochs in (1, 5):
        tasks = [method.task(state, client, method.epochs(epochs)) for client in EVERYBODY]
        training = Training(method.rule(SGD, 1), 8, method.trains, seed=0, round=1)
        updates = train_group(model, tasks, [examples_of(client) for client in EVERYBODY], training)
        assert [update.steps for update in updates] == [1] * CLIENTS


def test_dfedavgm_moves_on_by_a_share_of_its_last_move():
    assert load(None, ["algorithm.name=dfedavgm"]).local.momentum == 0.9
    assert load(None, ["algorithm.name=dfedavg"]).local.momentum == 0
    rule = make("dfedavgm").rule(LocalOptions(optimizer="sgd", lr=RATE, momentum=0.9), 1)

    class Slope:
        def grad(self, params):
            return torch.zeros(1), {name: torch.ones_like(w) for name, w in params.items()}

    params = {BIAS: torch.zeros(1, 1)}
    slots, walked = rule.start(params, {}, {}), []
    for _ in range(3):
        params, slots, _ = rule.step(params, slots, Slope())
        walked.append(params[BIAS].item())
    moves = np.diff([0, *walked])
    np.testing.assert_allclose(moves, [-RATE, -RATE * 1.9, -RATE * (1 + 0.9 * 1.9)], rtol=1e-6)


def test_on_a_full_graph_everybody_has_the_mean_without_weights_by_samples():
    method, values = make("dfedavg", graph="full"), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    state, metrics = aggregated(method, updates_of(values))
    np.testing.assert_allclose(prompts(method, state), np.mean(values), rtol=1e-6)
    assert metrics["consensus_distance"] == pytest.approx(0, abs=1e-5)
    assert metrics["spectral_gap"] == pytest.approx(1)
    assert state.params["prompt"].item() == pytest.approx(np.mean(values))


def test_the_consensus_distance_is_the_root_mean_square_from_the_mean():
    method, values = make("dfedavg"), np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    state, metrics = aggregated(method, updates_of(values))
    both = np.sqrt(2)  # prompt and head lie equally far from their means
    assert metrics["consensus_before_mixing"] == pytest.approx(both * values.std())
    after = ring() @ values
    assert metrics["consensus_distance"] == pytest.approx(both * after.std())
    np.testing.assert_allclose(prompts(method, state), after, rtol=1e-6)


def test_more_gossip_steps_come_closer_to_consensus_with_the_same_mean():
    values = [1.0, -2.0, 4.0, 0.0, 16.0, 3.0]
    apart = []
    for steps in (1, 4, 60):
        state, metrics = aggregated(make("dfedsam-mgs", gossip_steps=steps), updates_of(values))
        apart.append(metrics["consensus_distance"])
        assert state.params["prompt"].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert apart[0] > 3 * apart[1] > 0
    assert apart[2] < 1e-5


# --- who is away


def test_who_is_away_keeps_what_it_has_and_is_not_mixed():
    method = make("dfedavg")
    state, _ = aggregated(method, updates_of([1.0] * CLIENTS))
    state, metrics = aggregated(method, updates_of([5.0, 0.0, 8.0, 0.0, 2.0, 2.0], [0, 1, 2, 4, 5]), state)
    here = metropolis(np.array([[0, 1], [1, 2], [0, 4], [3, 4]]), 5).toarray()  # 3 of the ring is away: 4 is place 3
    expected = np.insert(here @ [5.0, 0.0, 8.0, 2.0, 2.0], 3, 1.0)
    np.testing.assert_allclose(prompts(method, state), expected, rtol=1e-6)
    assert state.params["prompt"].item() == pytest.approx(expected.mean())
    assert metrics["messages"] == 8


def test_who_never_took_part_still_has_the_start_and_counts_for_the_mean():
    method = make("dfedavg", graph="full")
    state = method.init(two_tensors(7.0, 0.0), None)
    state, metrics = aggregated(method, updates_of([1.0, 3.0] + [0.0] * 4, [0, 1]), state)
    np.testing.assert_allclose(prompts(method, state), [2, 2, 7, 7, 7, 7])
    assert state.params["prompt"].item() == pytest.approx((2 + 2 + 4 * 7) / 6)
    assert metrics["spectral_gap"] == pytest.approx(1)  # of those who were there


def test_one_client_alone_mixes_with_nobody():
    method = make("dfedavg")
    state, metrics = aggregated(method, updates_of([3.0] * CLIENTS, [4]))
    assert prompts(method, state)[4] == 3
    assert (metrics["messages"], metrics["up_bytes"]) == (0, 0)


def test_a_rounds_graph_and_lost_links_come_from_its_own_generator():
    method, values = make("dfedavg", graph="random", link_loss=0.3), np.arange(6.0)
    ends = [prompts(method, aggregated(method, updates_of(values), seed=seed)[0]) for seed in (0, 0, 1)]
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])
    networks = [method.network(clients, np.random.default_rng(3)) for clients in (EVERYBODY, EVERYBODY[:-1])]
    links = [{tuple(link) for link in network.links.tolist()} for network in networks]
    assert links[1] == {link for link in links[0] if 5 not in link}


def test_personal_heads_are_neither_mixed_nor_sent():
    method = make("dfedavg", {"personal_head": True}, graph="full")
    values = np.arange(6.0)
    state, metrics = aggregated(method, updates_of(values))
    assert [method.broadcast(state, c)[BIAS].item() for c in EVERYBODY] == (-values).tolist()
    np.testing.assert_allclose(prompts(method, state), 2.5)
    assert metrics["up_bytes"] == 6 * 5 * 8  # a prompt of one number, here float64, over every link, both ways
    assert metrics["consensus_distance"] == pytest.approx(0, abs=1e-6)


# --- what is sent


@pytest.mark.runs
@pytest.mark.parametrize(("name", "steps"), [("dfedavg", 1), ("dfedsam-mgs", 4)])
def test_bytes_are_a_model_per_link_direction_and_gossip_step(tmp_path, name, steps):
    records, state = tiny_run(tmp_path, f"algorithm.name={name}", "algorithm.graph=ring")
    model, messages = size_in_bytes(state.params), 2 * 6 * steps
    told = {"up_bytes": messages * model, "down_bytes": messages * model, "messages": messages}
    assert [record["communication"] for record in records[1:-1]] == [told, told]
    sent = records[-1]["result"]["communication"]
    assert sent["up_bytes"] == 2 * messages * model
    assert 0 < sent["up_bytes"] + sent["down_bytes"] < sent["full_model_bytes"]
    assert sent["full_model_bytes"] % (2 * 2 * messages) == 0


@pytest.mark.runs
@pytest.mark.parametrize(("compress", "most"), [("quantise", 0.26), ("topk", 0.21)])
def test_compressed_messages_are_as_much_shorter_as_they_say(tmp_path, compress, most):
    whole, _ = tiny_run(tmp_path / "whole", "algorithm.name=dfedavg")
    short, state = tiny_run(tmp_path / "short", "algorithm.name=dfedavg", f"algorithm.compress={compress}")
    ratio = short[-1]["result"]["communication"]["up_bytes"] / whole[-1]["result"]["communication"]["up_bytes"]
    assert most - 0.02 < ratio < most
    assert {PUBLIC + name for name in state.params} <= state.clients[0].keys()


def test_compressed_rounds_keep_the_mean_and_nearly_end_where_whole_messages_do():
    values = [1.0, -2.0, 4.0, 0.0, 16.0, 3.0]
    plain, fine = (make("dfedavg", **settings) for settings in ({}, {"compress": "quantise", "bits": 16}))
    state, other = (aggregated(method, updates_of(values))[0] for method in (plain, fine))
    np.testing.assert_allclose(prompts(fine, other), prompts(plain, state), atol=1e-2)
    assert other.params["prompt"].item() == pytest.approx(np.mean(values), rel=1e-5)


def test_who_missed_a_message_is_sent_the_whole_copy():
    method = make("dfedavg", compress="quantise", bits=8)
    model = {"prompt": torch.zeros(4, 100)}
    whole, short = 4 * 400, 400 + 4

    def updates(clients):
        return [Update(c, 1, 1, {"prompt": torch.full((4, 100), float(c))}, None, 0.0) for c in clients]

    state = method.init(model, None)
    state, first = aggregated(method, updates(EVERYBODY), state)
    assert first["up_bytes"] == 12 * short  # everybody knows the start that all have in common
    state, second = aggregated(method, updates([0, 1, 2, 3, 4]), state)  # 5 misses what 0 and 4 send
    assert second["up_bytes"] == 8 * short
    state, third = aggregated(method, updates(EVERYBODY), state)
    assert third["up_bytes"] == 10 * short + 2 * whole
    state, fourth = aggregated(method, updates(EVERYBODY), state)
    assert fourth["up_bytes"] == 12 * short
    assert state.memory[KNOWN].sum() == 12


# --- runs


@pytest.mark.runs
def test_all_clients_take_part_in_every_round(tmp_path):
    records, state = tiny_run(tmp_path, "algorithm.name=dfedavg", "federation.cohort=2")
    assert [record["cohort"] for record in records[1:-1]] == [EVERYBODY, EVERYBODY]
    assert sorted(state.clients) == EVERYBODY


@pytest.mark.runs
def test_result_tells_of_clients_average_consensus_and_gap(tmp_path):
    records, _ = tiny_run(tmp_path, "algorithm.name=dfedsam", "algorithm.graph=random", "algorithm.link_loss=0.4")
    result, rounds = records[-1]["result"], [record["aggregate"] for record in records[1:-1]]
    assert result["consensus_distance"] == rounds[-1]["consensus_distance"] > 0
    assert result["spectral_gap"] == pytest.approx(np.mean([metrics["spectral_gap"] for metrics in rounds]))
    assert rounds[-1]["consensus_before_mixing"] > result["consensus_distance"]
    assert result["clients"]["own_head_global_accuracy"] == result["final"]["accuracy"]
    assert result["final"]["client_averaged_model_accuracy"] == result["clients"]["averaged_model_accuracy"]
    assert 0 <= result["clients"]["averaged_model_accuracy"] <= 1


def test_methods_with_a_server_tell_nothing_of_that(tmp_path):
    result = tiny_run(tmp_path, "algorithm.name=fedavg")[0][-1]["result"]
    assert not {"consensus_distance", "spectral_gap"} & result.keys()
    assert "averaged_model_accuracy" not in result["clients"]


@pytest.mark.runs
def test_in_consensus_the_averaged_model_is_everybodys(tmp_path):
    records, state = tiny_run(tmp_path, "algorithm.name=dfedavg", "algorithm.graph=full")
    for own in state.clients.values():
        for name, value in state.params.items():
            torch.testing.assert_close(own[name], value, atol=1e-6, rtol=0)
    clients = records[-1]["result"]["clients"]
    assert clients["own_head_global_accuracy"] == pytest.approx(clients["averaged_model_accuracy"], abs=0.1)


HARD = ("algorithm.graph=random", "algorithm.link_loss=0.3", "federation.dropout=0.3")


COMPRESSED = {"dfedsam-mgs": "topk", "dpfpt": "quantise"}


@pytest.mark.runs
@pytest.mark.parametrize("method", METHODS)
def test_runs_repeat_and_a_resumed_run_is_the_run(tmp_path, method):
    options = (*quick(method), *HARD, f"algorithm.compress={COMPRESSED.get(method, 'none')}")
    whole, expected = tiny_run(tmp_path / "whole", *options)
    tiny_run(tmp_path / "parts", *options, "federation.rounds=1")
    parts, found = tiny_run(tmp_path / "parts", *options)
    assert same(found.params, expected.params)
    assert found.clients.keys() == expected.clients.keys()
    assert all(same(found.clients[client], store) for client, store in expected.clients.items())
    first, second = (dict(records[-1]["result"]) for records in (whole, parts))
    for result in (first, second):
        del result["seconds"]
    assert first == second
    assert all(torch.isfinite(value).all() for value in found.params.values())


@pytest.mark.runs
def test_two_threads_come_to_the_same_bits_as_one(tmp_path):
    states = [
        tiny_run(
            tmp_path / workers, *quick("dpfpt"), "local.rho=0.1", f"runtime.workers={workers}", "runtime.group_size=2"
        )[1]
        for workers in ("1", "2")
    ]
    assert same(states[0].params, states[1].params)


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["deep", "none", "lora"])
def test_every_kind_is_mixed(tmp_path, kind):
    _, state = tiny_run(
        tmp_path, "algorithm.name=dfedsam", f"prompt.kind={kind}", "algorithm.graph=full", "federation.rounds=1"
    )
    assert all(torch.allclose(state.clients[3][name], value, atol=1e-6) for name, value in state.params.items())


@pytest.mark.parametrize("method", METHODS)
def test_they_are_registered_and_own_everything(method):
    cls = registry.get(method)
    assert issubclass(cls, Decentralized)
    assert cls.averaged_model
    assert make(method).is_personal("prompt")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("algorithm.graph=star", r"^algorithm\.graph: found 'star'; allowed: .*'ring'"),
        ("algorithm.degree=3", r"^algorithm\.degree: found 3; allowed: a multiple of 2"),
        ("algorithm.link_loss=1", r"^algorithm\.link_loss: found 1; allowed: less than 1"),
        ("algorithm.compress=zip", r"^algorithm\.compress: found 'zip'"),
        ("algorithm.bits=1", r"^algorithm\.bits: found 1"),
        ("algorithm.share=0", r"^algorithm\.share: found 0"),
        ("algorithm.gossip_steps=3", r"^algorithm\.gossip_steps: not a key of 'dfedavg' but of dfedsam-mgs"),
        ("local.optimizer=lion", r"^local\.optimizer"),
    ],
)
def test_wrong_settings_are_told_in_one_line(override, line):
    with pytest.raises(InputError, match=line):
        load(None, ["algorithm.name=dfedavg", override])
