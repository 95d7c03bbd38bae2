"""Predictions do not depend on sharding at batch boundaries; scores are scikit-learn's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics

from fedprompt.client.evaluate import BATCHES_AT_ONCE, Predictions, client_scores, predict, scores
from fedprompt.client.examples import prepare
from fedprompt.models.params import stack

BATCH = 4
N = BATCH * BATCHES_AT_ONCE + 13  # more than runs at once, and a last batch of one


@pytest.fixture(scope="module")
def pool(make_model, make_examples):
    """A model that votes by batch, params with which votes matter, and examples; unlike queries make votes differ."""
    model = make_model("pool", top_k=1)
    params = model.init(np.random.default_rng(0))
    params["pool"] *= 8
    query = np.random.default_rng(1).normal(size=(N, 32)).astype(np.float32)
    return model, params, replace(prepare(model, make_examples(N), True), query=query)


@pytest.mark.parametrize("size", [BATCH, 3 * BATCH, 16 * BATCH])
def test_predicting_shards_equals_predicting_the_whole(pool, size):
    model, params, examples = pool
    whole = predict(model, params, examples, BATCH)
    parts = [
        predict(model, params, examples.take(np.arange(start, min(start + size, N))), BATCH)
        for start in range(0, N, size)
    ]
    together = Predictions.concatenate(parts)
    assert (together.predicted == whole.predicted).all()
    assert (together.labels == whole.labels).all()
    np.testing.assert_allclose(together.losses, whole.losses, atol=1e-5)


def test_batch_mates_matter_when_the_batch_votes(pool):
    """Else the test above would say nothing."""
    model, params, examples = pool
    whole = predict(model, params, examples, BATCH)
    shifted = predict(model, params, examples.take(np.arange(2, N)), BATCH)
    assert np.abs(shifted.losses - whole.losses[2:]).max() > 1e-2


def test_batch_mates_do_not_matter_when_instances_choose(pool, make_model):
    _, params, examples = pool
    model = make_model("pool", top_k=1, selection="instance")
    whole = predict(model, params, examples, BATCH)
    shifted = predict(model, params, examples.take(np.arange(2, N)), BATCH)
    np.testing.assert_allclose(shifted.losses, whole.losses[2:], atol=1e-5)


def test_predictions_are_the_models_without_dropout(pool, make_batch):
    model, params, examples = pool
    got = predict(model, params, examples, BATCH)
    start = 2 * BATCH
    own = slice(start, start + BATCH)
    batch = make_batch(
        (BATCH,), images=torch.from_numpy(examples.inputs[own].pixels()), query=torch.from_numpy(examples.query[own])
    )
    logits = model.forward(stack([params]), batch).logits
    losses = F.cross_entropy(logits, torch.from_numpy(examples.labels[own]), reduction="none")
    assert got.predicted[own].tolist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(got.losses[own], losses, atol=1e-5)
    assert (got.labels == examples.labels).all()


def test_masked_classes_are_never_predicted(pool):
    model, params, examples = pool
    allowed = np.array([[False, True, True, False, False]])
    masked = predict(model, params, examples, BATCH, allowed)
    assert set(masked.predicted) <= {1, 2}
    inside = np.isin(examples.labels, [1, 2])
    assert np.isfinite(masked.losses[inside]).all()
    assert np.isinf(masked.losses[~inside]).all()


def random_predictions(labels, predicted) -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(np.array(labels), np.array(predicted), rng.random(len(labels)).astype(np.float32))


RNG = np.random.default_rng(1)
TRUTH = RNG.integers(0, 6, 80)
CASES = {
    "all classes": (TRUTH, np.where(RNG.random(80) < 0.6, TRUTH, RNG.integers(0, 6, 80))),
    "a class without samples": (np.where(TRUTH == 2, 3, TRUTH), TRUTH),
    "a class that is never said": (TRUTH, np.where(TRUTH == 4, 0, TRUTH)),
    "a class that neither is nor is said": (np.where(TRUTH == 5, 0, TRUTH), np.where(TRUTH == 5, 1, TRUTH)),
    "all wrong": (TRUTH, (TRUTH + 1) % 6),
    "all right": (TRUTH, TRUTH),
    "one sample": (np.array([3]), np.array([3])),
}


@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")
@pytest.mark.parametrize(("labels", "predicted"), CASES.values(), ids=CASES.keys())
def test_scores_are_scikit_learns(labels, predicted):
    predictions = random_predictions(labels, predicted)
    got = scores(predictions, 6)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert got["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert got["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
    assert got["loss"] == pytest.approx(predictions.losses.mean())
    assert predictions.accuracy == pytest.approx(got["accuracy"])
    recalls = metrics.recall_score(labels, predicted, labels=range(6), average=None, zero_division=0)
    for k, value in enumerate(got["per_class"]):
        assert value == (pytest.approx(recalls[k]) if (labels == k).any() else None)


def test_taking_predictions_and_the_accuracy_of_none():
    predictions = random_predictions([0, 1, 2, 3], [0, 1, 0, 0])
    assert predictions.correct.tolist() == [True, True, False, False]
    assert predictions.take(np.array([3, 0])).labels.tolist() == [3, 0]
    assert predictions.take(np.array([1, 0, 2])).accuracy == pytest.approx(2 / 3)
    assert predictions.take(np.array([], dtype=np.int64)).accuracy == 0


@pytest.mark.parametrize(
    ("clients", "worst"),
    [(25, (0.0 + 0.01) / 2), (20, (0.0 + 0.01) / 2), (19, 0.0), (10, 0.0), (3, 0.0)],
)
def test_the_worst_decile_is_the_mean_of_the_lowest_tenth(clients, worst):
    accuracies = np.random.default_rng(0).permutation(clients) / 100
    got = client_scores(accuracies, [20] * clients)
    assert got["worst_decile_accuracy"] == pytest.approx(worst)
    assert got["mean_accuracy"] == pytest.approx(accuracies.mean())


def test_the_worst_decile_is_not_told_where_a_client_has_fewer_than_20_samples():
    got = client_scores([0.5, 0.7, 0.9], [20, 19, 200])
    assert got == {
        "mean_accuracy": pytest.approx(0.7),
        "worst_decile_accuracy": None,
        "accuracies": [0.5, 0.7, 0.9],
    }


def test_clients_without_test_samples_do_not_count():
    got = client_scores([0.5, 0.0, 0.9], [30, 0, 30])
    assert (got["mean_accuracy"], got["accuracies"]) == (pytest.approx(0.7), [0.5, None, 0.9])
    none = {"mean_accuracy": None, "worst_decile_accuracy": None, "accuracies": [None]}
    assert client_scores([0.0], [0]) == none


def test_an_answer_that_is_no_number_is_never_right(make_model, make_examples):
    model = make_model()
    params = model.init(np.random.default_rng(0))
    examples = prepare(model, make_examples(N), False)
    broken = {name: torch.full_like(value, torch.nan) for name, value in params.items()}
    predictions = predict(model, broken, examples, BATCH)
    assert predictions.accuracy == 0
    assert not predictions.correct.any()
    told = scores(predictions, int(examples.labels.max()) + 1)
    assert told["accuracy"] == told["balanced_accuracy"] == told["macro_f1"] == 0
