"""Workers of this process's host read its images where they lie, others get copies: the same numbers either way."""

import os
from dataclasses import replace

import numpy as np
import pytest

ray = pytest.importorskip("ray")

from fedprompt.data.images import Handle, empty  # noqa: E402
from fedprompt.data.inputs import ImageInputs  # noqa: E402
from fedprompt.runtime.build import build_algorithm, build_data  # noqa: E402
from fedprompt.runtime.pool import InProcessPool  # noqa: E402
from fedprompt.runtime.ray.places import reserved  # noqa: E402
from fedprompt.runtime.ray.pool import RayPool  # noqa: E402

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("small_cluster"),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux"),
]
IN_EVERY_STEP = ("algorithm.name=fedavg", "prompt.layer=0", "runtime.workers=1")


@pytest.fixture
def shared_data(shared_runs):
    """The data of a run that needs images in every step, in memory that workers can map."""
    data = build_data(shared_runs.config(*IN_EVERY_STEP))
    for split in {id(view.split): view.split for view in (data.train, data.test)}.values():
        images = empty(split.inputs.array.shape)
        images[:] = split.inputs.array
        object.__setattr__(split, "inputs", ImageInputs(images))  # frozen, for everybody else
    return data


def trained_and_predicted(pool, config):
    """Params of three clients after a round, and what one of them predicts, in all ways that a pool offers."""
    algorithm = build_algorithm(config)
    state = algorithm.init(pool.facts.params, np.random.default_rng(0))
    groups = [[algorithm.task(state, client, 1) for client in group] for group in ((0, 1), (2,))]
    updates = sorted((update for done in pool.train(1, groups) for update in done), key=lambda update: update.clients)
    params = updates[0].params
    whole = pool.predict("validation", params)
    of_clients = pool.predict_clients("test", {1: params}, {1: np.array([5, 3, 9])})
    return [*(update.params for update in updates)], whole.losses, of_clients[1].losses


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.long
def test_workers_read_images_where_they_lie_or_get_copies_where_they_cannot(
    shared_runs, shared_data, monkeypatch, reachable
):
    config = shared_runs.config(*IN_EVERY_STEP)
    alone = InProcessPool(config, shared_data)
    expected = trained_and_predicted(alone, config)
    alone.close()
    copied, put, handle = [], ray.put, Handle.of
    monkeypatch.setattr(ray, "put", lambda value: copied.append(isinstance(value, ImageInputs)) or put(value))
    if not reachable:  # as from another host, where the number of this process means another one, or none
        monkeypatch.setattr(Handle, "of", lambda array: replace(handle(array), name="of another host"))
    with reserved(config) as places:
        pool = RayPool(config, shared_data, places)
        try:
            found = trained_and_predicted(pool, config)
        finally:
            pool.close()
    assert any(copied) is not reachable
    assert len(pool._elsewhere) == (0 if reachable else 1)
    for of_client, wanted in zip(found[0], expected[0], strict=True):
        for name, value in wanted.items():
            np.testing.assert_array_equal(of_client[name], value)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[2], expected[2])
