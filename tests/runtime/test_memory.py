"""What a run keeps of its images: what is prepared of them, and themselves only within a byte budget."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.pool import InProcessPool

NO_ROOM = "runtime.cache_mb=0.001"


def warnings(records):
    return [record.get("warnings", []) for record in records if "round" in record]


def test_tokens_that_do_not_fit_are_told_once_and_change_no_result(runs, same_params):
    roomy, cramped = runs.local("roomy"), runs.local("cramped", NO_ROOM)
    assert not any(warnings(roomy))
    at_the_start, told, *later = warnings(cramped)
    (line,) = told
    assert line.startswith("tokens before block 2 of all images take ")
    assert line.endswith("MB, more than runtime.cache_mb = 0.001: they are computed again in every step")
    assert not any([at_the_start, *later])
    found = [[record["test"]["accuracy"] for record in records if "test" in record] for records in (roomy, cramped)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_it_is_not_told_again_on_resume(runs):
    runs.local("run", NO_ROOM, "federation.rounds=1")
    assert not any(warnings(runs.local("run", NO_ROOM, "federation.rounds=3")))


@pytest.mark.parametrize("override", ["prompt.layer=0", "prompt.kind=none"])
def test_where_there_are_no_tokens_to_keep_nothing_is_told(runs, override):
    assert not any(warnings(runs.local("run", NO_ROOM, "algorithm.name=fedavg", override)))


@pytest.mark.parametrize(
    ("overrides", "held"),
    [
        ((), {"tokens", "query"}),
        ((NO_ROOM,), {"query"}),
        (("algorithm.name=fedavg", NO_ROOM), set()),
        (("algorithm.name=fedavg", "prompt.kind=none"), {"query"}),
    ],
)
def test_prepared_examples_hold_no_images(runs, overrides, held):
    config = runs.config(*overrides)
    data, algorithm = build_data(config), build_algorithm(config)
    pool = InProcessPool(config, data)
    state = algorithm.init(pool.facts.params, np.random.default_rng(0))
    list(pool.train(1, [[algorithm.task(state, client, 1.0) for client in (3, 1)]]))
    pool.predict("test", state.params)
    prepared = [*pool._parts.values(), *(part for parts in pool._shards.values() for part in parts)]
    assert len(prepared) > 2
    for examples in prepared:
        assert {name for name in ("tokens", "query") if getattr(examples, name) is not None} == held
        assert examples.inputs is None
