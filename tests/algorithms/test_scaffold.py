"""SCAFFOLD against rounds by hand, and what must hold of its controls."""

import numpy as np
import pytest
import torch
from by_hand import (
    BIAS,
    RATE,
    SGD,
    WEIGHT,
    Bowl,
    arrays,
    assert_near,
    combined,
    drawn,
    examples_of,
    linear,
    make,
    mean,
    play,
    start_of,
    tiny_run,
    walk,
)

from fedprompt.algorithms.base import RULE
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.tasks import Update
from fedprompt.config.parsing import load
from fedprompt.errors import InputError

CLIENTS = 6


def numpy_scaffold(start, cohorts, server_lr, form):
    """Algorithm 1 with option II, in the paper's symbols: x, c, every client's c_i, after every round."""
    x, c = start, combined(np.zeros_like, start)
    own = {client: combined(np.zeros_like, start) for client in range(CLIENTS)}
    last = dict.fromkeys(range(CLIENTS))  # x after a client's own last round
    for round, cohort in enumerate(cohorts, start=1):
        moves, changes = [], []
        for i in cohort:
            begin = last[i] if form == "reference" and last[i] is not None else x

            def step(y, grads, _, c=c, c_i=own[i]):
                return combined(lambda w, g, mine, all: w - RATE * (g - mine + all), y, grads, c_i, c)

            y, steps, _ = walk(begin, i, round, step)
            after = combined(lambda mine, all, x, y, k=steps: mine - all + (x - y) / (k * RATE), own[i], c, begin, y)
            moves.append(combined(np.subtract, y, begin))
            changes.append(combined(np.subtract, after, own[i]))
            own[i] = after
        x = combined(lambda x, move: x + server_lr * move, x, mean(moves, [1] * len(cohort)))
        for change in changes:
            c = combined(lambda c, d: c + d / CLIENTS, c, change)
        last.update(dict.fromkeys(cohort, x))
        yield x, c, own


@pytest.mark.parametrize(("form", "server_lr"), [("paper", 1.0), ("paper", 0.4), ("reference", 1.0)])
def test_rounds_of_changing_cohorts_equal_the_algorithm_in_float64(make_model, form, server_lr):
    model = linear(make_model)
    algorithm = make("scaffold", server_lr=server_lr, form=form)
    state = algorithm.init(start_of(model), None)
    cohorts = [[0, 2, 5], [1, 2], [0, 2, 4, 5], [1, 3, 5]]
    expected = numpy_scaffold(arrays(state.params), cohorts, server_lr, form)
    for round, (cohort, (x, c, own)) in enumerate(zip(cohorts, expected, strict=True), start=1):
        state, _ = play(algorithm, model, state, cohort, round)
        assert_near(state.params, x)
        assert_near(state.memory["control"], c)
        for client, store in state.clients.items():
            assert_near({n: store[RULE + n] for n in (WEIGHT, BIAS)}, own[client])
    assert state.clients.keys() == set(range(CLIENTS))
    assert min(np.abs(value).max() for value in c.values()) > 1e-3  # the controls had something to say


def test_the_first_round_of_identical_clients_is_that_of_fedavg(make_model):
    model, cohort = linear(make_model), [0, 1, 4]
    twins = {"data": [examples_of(2)] * 3, "batch_size": 64}  # one batch holds all: its order does not matter
    ends = {}
    for name in ("fedavg", "scaffold"):
        algorithm = make(name)
        state = algorithm.init(start_of(model), None)
        for round in (1, 2):
            state, _ = play(algorithm, model, state, cohort, round, **twins)
            ends[name, round] = arrays(state.params)
    for name in (WEIGHT, BIAS):
        np.testing.assert_allclose(ends["scaffold", 1][name], ends["fedavg", 1][name], rtol=0, atol=1e-12)
        assert np.abs(ends["scaffold", 2][name] - ends["fedavg", 2][name]).max() > 1e-3  # c is half of every c_i


def test_a_step_is_corrected_by_the_servers_control_minus_the_clients_own():
    params, targets, server, own = (drawn(seed) for seed in range(4))
    rule = make("scaffold").rule(LocalOptions(optimizer="sgd", lr=0.2, prompt_lr=0.5), 2)
    stepped, _, _ = rule.step(params, rule.start(params, server, own), Bowl(targets, [False] * 3))
    for name, rate in (("prompt", 0.5), (BIAS, 0.2)):
        expected = params[name] - rate * ((params[name] - targets[name]) - own[name] + server[name])
        torch.testing.assert_close(stepped[name], expected, atol=1e-14, rtol=0)


def test_the_next_control_is_the_mean_gradient_on_the_way():
    params, targets, server, own = (drawn(seed) for seed in range(4))
    rule = make("scaffold").rule(LocalOptions(optimizer="sgd", lr=0.2, prompt_lr=0.5), 2)
    slots, seen = rule.start(params, server, own), []
    for _ in range(4):
        seen.append({name: params[name] - targets[name] for name in params})
        params, slots, _ = rule.step(params, slots, Bowl(targets, [False] * 3))
    change, kept = rule.finish(params, slots, 4)
    for name in params:  # option II: the corrections cancel out
        torch.testing.assert_close(kept[name], torch.stack([g[name] for g in seen]).mean(0), atol=1e-13, rtol=0)
        torch.testing.assert_close(change[name], kept[name] - own[name], atol=1e-13, rtol=0)


def test_a_client_that_joins_late_starts_with_a_control_of_zero(make_model):
    model, algorithm = linear(make_model), make("scaffold")
    state, _ = play(algorithm, model, algorithm.init(start_of(model), None), [0, 2], round=1)
    assert algorithm.task(state, 5, 1).kept == {}
    assert any(value.any() for value in algorithm.task(state, 5, 1).sent.values())
    _, (known, late) = play(algorithm, model, state, [2, 5], round=2)
    for name in (WEIGHT, BIAS):  # Δc_i = c_i⁺ - 0
        torch.testing.assert_close(late.kept[name], late.reply[name], atol=1e-14, rtol=0)
        assert not torch.allclose(known.kept[name], known.reply[name])


def moved(client, params, samples=10, controls=None):
    controls = controls or {}
    return Update(client, samples, 1, params, selected=None, loss=0.0, reply=controls, kept=controls)


def two_tensors(prompt, head):
    return {"prompt": torch.tensor([[prompt]]), "head.1.bias": torch.tensor([head])}


def test_clients_count_alike_whatever_their_number_of_samples():
    algorithm = make("scaffold", server_lr=0.5)
    state = algorithm.init(two_tensors(1.0, 1.0), None)
    controls = [two_tensors(3.0, 0.0), two_tensors(9.0, 6.0)]
    updates = [moved(1, two_tensors(2.0, 1.0), 10, controls[0]), moved(4, two_tensors(6.0, 3.0), 990, controls[1])]
    state, metrics = algorithm.aggregate(state, updates, None)
    assert (state.params["prompt"].item(), state.params["head.1.bias"].item()) == (2.5, 1.5)  # 1 + half the mean move
    control = [state.memory["control"][name].item() for name in ("prompt", "head.1.bias")]
    assert control == pytest.approx([(3 + 9) / CLIENTS, (0 + 6) / CLIENTS])
    assert metrics["control_norm"] == pytest.approx(5**0.5)


def test_personal_heads_have_no_control_and_step_by_plain_sgd():
    algorithm = make("scaffold", {"personal_head": True})
    params, targets, server = drawn(0), drawn(1), {"prompt": drawn(2)["prompt"]}
    state = algorithm.init({name: value[0] for name, value in params.items()}, None)
    assert algorithm.send(state, 3).keys() == {"prompt"}
    rule = algorithm.rule(SGD, 1)
    slots = rule.start(params, server, {})
    stepped, slots, _ = rule.step(params, slots, Bowl(targets, [True] * 3))
    torch.testing.assert_close(stepped[BIAS], params[BIAS] - RATE * (params[BIAS] - targets[BIAS]), atol=0, rtol=0)
    assert all(part.keys() == {"prompt"} for part in rule.finish(stepped, slots, 1))


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_personal_heads_stay_with_their_client_and_the_server_holds_their_plain_mean(form):
    algorithm = make("scaffold", {"personal_head": True}, server_lr=3.0, form=form)
    state = algorithm.init(two_tensors(0.0, 7.0), None)
    control = {"prompt": torch.tensor([[1.0]])}
    updates = [moved(c, two_tensors(p, h), controls=control) for c, p, h in ((1, 1.0, -3.0), (4, 5.0, 1.0))]
    state, _ = algorithm.aggregate(state, updates, None)
    heads = {client: algorithm.broadcast(state, client)["head.1.bias"].item() for client in (1, 4, 2)}
    assert heads == {1: -3.0, 4: 1.0, 2: 7.0}
    assert (state.params["prompt"].item(), state.params["head.1.bias"].item()) == (9.0, -1.0)


def test_the_published_codes_form_restarts_clients_from_the_x_of_their_own_last_round(make_model):
    model, algorithm = linear(make_model), make("scaffold", form="reference")
    states = [algorithm.init(start_of(model), None)]
    for round, cohort in enumerate(([0, 1], [1, 2]), start=1):
        states.append(play(algorithm, model, states[-1], cohort, round)[0])
    for client, after in ((0, 1), (1, 2), (2, 2), (3, 2)):  # 3 has not taken part: it gets today's
        assert torch.equal(algorithm.broadcast(states[2], client)[WEIGHT], states[after].params[WEIGHT])
    assert not torch.equal(states[1].params[WEIGHT], states[2].params[WEIGHT])
    paper = make("scaffold").broadcast(states[2], 3)
    assert torch.equal(paper[WEIGHT], states[2].params[WEIGHT])


@pytest.mark.parametrize("name", ["scaffold", "dpsgd"])
def test_momentum_is_refused_when_the_configuration_is_read(name):
    with pytest.raises(InputError, match=rf"^local\.momentum: 0\.9 .*'{name}'; allowed: 0$"):
        load(None, [f"algorithm.name={name}", "local.momentum=0.9"])


def test_adam_is_refused_when_the_configuration_is_read():
    with pytest.raises(InputError, match=r"^local\.optimizer: 'adam' .*'scaffold'; allowed: sgd$"):
        load(None, ["algorithm.name=scaffold", "local.optimizer=adam"])
    assert load(None, ["algorithm.name=scaffold"]).local.optimizer == "sgd"


@pytest.mark.runs
def test_with_everybody_in_the_cohort_the_mean_control_is_the_servers_in_every_round(tmp_path):
    for rounds in (1, 2, 3):
        everybody = ("federation.clients=4", "federation.cohort=4", f"federation.rounds={rounds}")
        _, state = tiny_run(tmp_path, "algorithm.name=scaffold", *everybody)
        assert len(state.clients) == 4
        for name, control in state.memory["control"].items():
            own = torch.stack([store[RULE + name] for store in state.clients.values()])
            torch.testing.assert_close(own.mean(0), control, atol=1e-6, rtol=1e-4)
            assert control.abs().max() > 1e-4


@pytest.mark.runs
@pytest.mark.parametrize("personal", [False, True])
def test_controls_are_counted_in_both_directions(tmp_path, personal):
    head = f"head.personal={str(personal).lower()}"
    records, state = tiny_run(tmp_path, "algorithm.name=scaffold", "federation.rounds=1", head)
    sizes = {name: value.numel() * 4 for name, value in state.params.items()}
    shared = sum(size for name, size in sizes.items() if not (personal and name.startswith("head.")))
    expected = 3 * 2 * shared  # a cohort of three; params and controls
    assert records[1]["communication"] == {"up_bytes": expected, "down_bytes": expected}
    controls = {name for name in sizes if not (personal and name.startswith("head."))}
    own = {RULE + name for name in controls} | (sizes.keys() - controls)
    assert all(store.keys() == own for store in state.clients.values())
