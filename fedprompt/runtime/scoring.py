"""Scoring a state: the global params, and clients' own where a method or a personal head gives them some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedprompt.algorithms.base import Algorithm, State
from fedprompt.client.evaluate import Predictions, client_scores, scores
from fedprompt.data import FederatedData
from fedprompt.models.params import HEAD, Params
from fedprompt.runtime.checked import CheckedMethod
from fedprompt.runtime.pool import Pool, SplitName
from fedprompt.seeding import Stream, generator

SUBSAMPLE = 200  # images of a split on which every client's own model is scored


def evaluate(
    pool: Pool, algorithm: CheckedMethod, state: State, data: FederatedData, seed: int
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return ``validation``, ``test`` and ``clients`` as they stand in a line of metrics.jsonl.

    And which prompts of a shared pool served the test set, bool [P].

    Shared params are scored on the whole splits. A client's accuracy on its local test data is read off the same
    predictions: so the batches in which prompts are voted for never depend on a client's skewed labels.
    Where clients own more than a head, or share nothing at all, ``validation`` and ``test`` are means over the clients'
    models on a fixed subsample; where the state holds the models' mean (``averaged_model``), that is scored besides, on
    the whole test set. Where clients own the head alone, the global params hold its average, and the own heads are
    scored besides.
    """
    personal = [name for name in state.params if algorithm.is_personal(name)]
    if any(not name.startswith(HEAD) for name in personal) or len(personal) == len(state.params):
        test, validation = (
            _mean_over_clients(pool, algorithm, state, data, split, seed) for split in ("test", "validation")
        )
        clients = {**_own_local(pool, algorithm, state, data), "own_head_global_accuracy": test["accuracy"]}
        if algorithm.averaged_model:
            clients["averaged_model_accuracy"] = pool.predict("test", state.params).accuracy
        return {"validation": validation, "test": test, "clients": clients}, None
    test_predictions = pool.predict("test", state.params)
    classes = len(data.class_names)
    test = scores(test_predictions, classes)
    validation = scores(pool.predict("validation", state.params), classes)
    clients = _shared_local(test_predictions, data)
    if personal:
        own = _mean_over_clients(pool, algorithm, state, data, "test", seed)
        clients = {
            **_own_local(pool, algorithm, state, data),
            "own_head_global_accuracy": own["accuracy"],
            "averaged_head_global_accuracy": test["accuracy"],
        }
    return {"validation": validation, "test": test, "clients": clients}, test_predictions.selected


def images_scored(algorithm: Algorithm, names: Sequence[str], data: FederatedData) -> int:
    """How many images ``evaluate`` predicts for params of these names, none of which is a personal head."""
    test, validation = len(data.test), len(data.validation)
    if not any(map(algorithm.is_personal, names)):
        return test + validation
    each = min(SUBSAMPLE, test) + min(SUBSAMPLE, validation)
    own = sum(map(len, data.local_tests))
    return each * len(data.local_tests) + own + test * algorithm.averaged_model


def subsample(labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices of a fixed part of a split, every class with its share but for an image or two, ascending."""
    size = min(SUBSAMPLE, len(labels))
    rng = generator(seed, Stream.SUBSAMPLE)
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[np.linspace(0, len(labels) - 1, size).round().astype(int)])


def _clients_params(algorithm: CheckedMethod, state: State, data: FederatedData) -> dict[int, Params]:
    return {client: algorithm.broadcast(state, client) for client in range(len(data.local_tests))}


def _shared_local(test: Predictions, data: FederatedData) -> dict[str, Any]:
    return client_scores([test.take(i).accuracy for i in data.local_tests], [len(i) for i in data.local_tests])


def _own_local(pool: Pool, algorithm: CheckedMethod, state: State, data: FederatedData) -> dict[str, Any]:
    indices = {client: own for client, own in enumerate(data.local_tests) if len(own)}
    models = {c: params for c, params in _clients_params(algorithm, state, data).items() if c in indices}
    predictions = pool.predict_clients("test", models, indices)
    accuracies = [predictions[c].accuracy if c in indices else 0.0 for c in range(len(data.local_tests))]
    return client_scores(accuracies, [len(own) for own in data.local_tests])


def _mean_over_clients(
    pool: Pool, algorithm: CheckedMethod, state: State, data: FederatedData, split: SplitName, seed: int
) -> dict[str, Any]:
    labels = getattr(data, split).labels
    part, models = subsample(labels, seed), _clients_params(algorithm, state, data)
    predictions = pool.predict_clients(split, models, dict.fromkeys(models, part))
    each = [scores(predictions[c], len(data.class_names)) for c in models]
    mean = {k: float(np.mean([s[k] for s in each])) for k in ("accuracy", "balanced_accuracy", "macro_f1", "loss")}
    per_class = zip(*(s["per_class"] for s in each), strict=True)
    return {**mean, "per_class": [None if values[0] is None else float(np.mean(values)) for values in per_class]}
