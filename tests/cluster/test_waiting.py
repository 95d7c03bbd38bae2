"""A run on a busy cluster says what it waits for, and can be stopped while it waits."""

import time

import pytest
from tiny import TINY

ray = pytest.importorskip("ray")

from ray.util.placement_group import placement_group, remove_placement_group  # noqa: E402

from fedprompt.config.parsing import load  # noqa: E402
from fedprompt.runtime.ray import places  # noqa: E402
from fedprompt.runtime.ray.on_ray import run_on_ray  # noqa: E402

OVERRIDES = [*TINY, "algorithm.sweeps=3", "runtime.workers=2"]


@pytest.fixture
def busy_cluster(small_cluster):
    """A cluster with two CPUs that somebody else holds; gives what makes it free."""
    held = placement_group([{"CPU": 2}])
    assert held.wait(60)
    yield lambda: remove_placement_group(held)
    remove_placement_group(held)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Tell at once what a run waits for."""
    monkeypatch.setattr(places, "PATIENCE", 0)


def after_stages(records):
    """The first record that is no stage of the preparation."""
    return next(record for record in records if "stage" not in record)


@pytest.mark.ray
def test_a_run_without_room_says_what_it_waits_for_once_and_goes_on(busy_cluster, tmp_path):
    records = run_on_ray(load(None, OVERRIDES), tmp_path / "run")
    assert after_stages(records) == {
        "note": "waiting for room for 2 workers with 1 CPU each (0 of the cluster's 2 are free)"
    }
    busy_cluster()
    rest = list(records)
    assert not any("note" in record for record in rest)
    assert rest[-1]["result"]["rounds"] == 2
    assert wait_until_free(2)


def wait_until_free(cpus):
    """Whether all CPUs are free again within a minute: a run gives back its places."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < cpus and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0) == cpus


@pytest.mark.ray
def test_a_run_without_room_can_be_stopped_and_no_longer_waits_for_any(busy_cluster, tmp_path):
    records = run_on_ray(load(None, OVERRIDES), tmp_path / "run")
    assert "note" in after_stages(records)
    with pytest.raises(KeyboardInterrupt):
        records.throw(KeyboardInterrupt)
    busy_cluster()
    assert wait_until_free(2)
    assert not (tmp_path / "run").exists()
