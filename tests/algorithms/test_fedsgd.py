"""FedSGD against steps by hand: what clients send, how it is averaged, and what the server makes of it."""

import numpy as np
import pytest
import torch
from by_hand import (
    BATCH_SIZE,
    RATE,
    SEED,
    SIZES,
    arrays,
    assert_near,
    combined,
    examples_of,
    linear,
    make,
    mean,
    play,
    same,
    softmax_regression,
    start_of,
    tiny_run,
)

from fedprompt.client.batches import plan_batches
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.seeding import Stream, generator

COHORTS = [[0, 2, 4, 5], [1, 2, 3], [0, 3, 5]]


class OneBatch:
    """The method with one step, as its ``epochs`` says and the federation asks."""

    def __init__(self, algorithm):
        self._algorithm = algorithm

    def __getattr__(self, name):
        return getattr(self._algorithm, name)

    def task(self, state, client, epochs):
        return self._algorithm.task(state, client, self._algorithm.epochs(epochs))


def gradient(params, client, round, batch_size=BATCH_SIZE):
    """The gradient of a client's first batch of a round, in numpy."""
    examples = examples_of(client)
    plan = plan_batches(len(examples), 1, batch_size, generator(SEED, Stream.BATCHES, round, client))
    return softmax_regression(params, examples.query[plan[0]], examples.labels[plan[0]])[1]


def test_plain_fedsgd_is_a_step_along_the_mean_gradient(make_model):
    model, algorithm = linear(make_model), OneBatch(make("fedsgd", server="sgd", server_lr=RATE))
    state = algorithm.init(start_of(model), None)
    expected = arrays(state.params)
    for round, cohort in enumerate(COHORTS, start=1):
        state, updates = play(algorithm, model, state, cohort, round)
        grads = mean([gradient(expected, c, round) for c in cohort], [SIZES[c] for c in cohort])
        expected = combined(lambda w, g: w - RATE * g, expected, grads)
        assert_near(state.params, expected)
        assert [update.steps for update in updates] == [1] * len(cohort)


def test_adam_on_the_server_is_that_of_fedopt_on_the_negative_gradient(make_model):
    beta1, beta2, tau, lr = 0.8, 0.95, 1e-4, 0.05
    model = linear(make_model)
    algorithm = OneBatch(make("fedsgd", server="adam", server_lr=lr, beta1=beta1, beta2=beta2, tau=tau))
    state = algorithm.init(start_of(model), None)
    expected = arrays(state.params)
    m, v = combined(np.zeros_like, expected), combined(lambda w: np.full_like(w, tau**2), expected)
    for round, cohort in enumerate(COHORTS, start=1):
        state, _ = play(algorithm, model, state, cohort, round)
        g = mean([gradient(expected, c, round) for c in cohort], [SIZES[c] for c in cohort])
        m = combined(lambda m, g: beta1 * m - (1 - beta1) * g, m, g)
        v = combined(lambda v, g: beta2 * v + (1 - beta2) * g**2, v, g)
        expected = combined(lambda w, m, v: w + lr * m / (np.sqrt(v) + tau), expected, m, v)
        assert_near(state.params, expected)


def test_a_batch_of_all_its_data_makes_a_client_send_the_whole_gradient(make_model):
    model, algorithm = linear(make_model), OneBatch(make("fedsgd", server="sgd", server_lr=1.0))
    state = algorithm.init(start_of(model), None)
    after, _ = play(algorithm, model, state, [2], 1, batch_size=100)
    examples = examples_of(2)
    _, grads = softmax_regression(arrays(state.params), examples.query, examples.labels)
    assert_near(after.params, combined(np.subtract, arrays(state.params), grads))


def test_a_step_of_one_client_is_fedavgs_with_one_step_of_sgd(make_model):
    model = linear(make_model)
    sgd, average = OneBatch(make("fedsgd", server="sgd", server_lr=RATE)), make("fedavg")
    state = sgd.init(start_of(model), None)
    stepped, _ = play(sgd, model, state, COHORTS[0], 1)
    average.task, task = (lambda state, client, epochs: task(state, client, 0.0)), average.task
    averaged, _ = play(average, model, average.init(start_of(model), None), COHORTS[0], 1)
    assert_near(stepped.params, arrays(averaged.params))


def test_a_personal_head_makes_a_step_of_its_own_at_home(make_model):
    model, algorithm = linear(make_model), OneBatch(make("fedsgd", {"personal_head": True}))
    state = algorithm.init(start_of(model), None)
    after, _ = play(algorithm, model, state, [1, 3], 1)
    start = arrays(state.params)
    for client in (1, 3):
        assert_near(
            after.clients[client], combined(lambda w, g: w - RATE * g, start, gradient(start, client, 1)), atol=1e-9
        )
    assert after.memory["first"] == {}


def test_groups_may_be_averaged_before_they_are_sent(make_model):
    model, algorithm = linear(make_model), OneBatch(make("fedsgd"))
    state = algorithm.init(start_of(model), None)
    after, updates = play(algorithm, model, state, COHORTS[0], 1)
    (merged,) = algorithm.summarize(updates)
    assert merged.clients == (0, 2, 4, 5)
    assert_near(algorithm.aggregate(state, [merged], None)[0].params, arrays(after.params))


@pytest.mark.runs
def test_a_run_is_repeatable_and_resumes_and_learns(tmp_path):
    method = ("algorithm.name=fedsgd", "algorithm.server_lr=0.003")
    records, state = tiny_run(tmp_path / "whole", *method, "federation.rounds=40", "federation.eval_every=20")
    tiny_run(tmp_path / "parts", *method, "federation.rounds=20", "federation.eval_every=20")
    _, again = tiny_run(tmp_path / "parts", *method, "federation.rounds=40", "federation.eval_every=20")
    assert same(state.params, again.params)
    assert torch.isfinite(state.params["prompt"]).all()
    losses = [record["train"]["loss"] for record in records[1:-1]]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert records[1]["communication"]["up_bytes"] == records[1]["communication"]["down_bytes"]


def test_an_adaptive_client_means_nothing_and_is_refused():
    with pytest.raises(InputError, match=r"local\.optimizer: 'adam' does not go with algorithm\.name = 'fedsgd'"):
        load(None, ["algorithm.name=fedsgd", "local.optimizer=adam"])
