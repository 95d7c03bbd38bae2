"""On Ray the same happens as in one process, whoever does the work and whoever dies meanwhile."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

ray = pytest.importorskip("ray")

from fedprompt.cli import main  # noqa: E402
from fedprompt.failure import told  # noqa: E402
from fedprompt.interrupts import terminated_as_interrupt  # noqa: E402
from fedprompt.runtime.ray.on_ray import connected, run_on_ray  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("small_cluster")]


@pytest.fixture(scope="module")
def local(shared_runs):
    """Records of the run in this process that all others are compared with."""
    return shared_runs.local("local")


@pytest.fixture(scope="module")
def two(shared_runs):
    """Records of the run on two workers with half a core each."""
    return list(on_ray(shared_runs, "two", "runtime.workers=2", "runtime.cpus_per_worker=0.5"))


def on_ray(runs, name, *overrides):
    return run_on_ray(runs.config(*overrides), runs.folder / name)


def children(parent):
    """Process ids and titles of a process's children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended meanwhile
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent:
            found[int(folder.name)] = title
    return found


def processes_of(actor):
    """Process ids of this cluster's actors of a class."""
    raylets = [pid for pid, title in children(os.getpid()).items() if "raylet" in title]
    return [pid for raylet in raylets for pid, title in children(raylet).items() if title.startswith(f"ray::{actor}")]


def wait_for_none_of(actor):
    """Ray ends the process of a killed actor when it gets round to it: wait for that, up to a minute."""
    deadline = time.monotonic() + 60
    while left := processes_of(actor):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def accuracies(records):
    return [record["test"]["accuracy"] for record in records if "test" in record]


@pytest.mark.parametrize("workers", ["one", "two"])
def test_workers_find_what_one_process_finds(local, shared_runs, two, workers):
    records = two if workers == "two" else list(on_ray(shared_runs, "one", "runtime.workers=1"))
    assert accuracies(records) == pytest.approx(accuracies(local), abs=1e-3)
    expected, found = shared_runs.params("local"), shared_runs.params(workers)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], atol=1e-4) for name in expected)
    assert len(accuracies(records)) == 4
    assert records[-1]["result"]["communication"] == local[-1]["result"]["communication"]


def test_images_that_have_no_room_in_the_object_store_are_put_there_again(shared_runs):
    no_room = "runtime.cache_mb=0.001"
    expected = shared_runs.local("cramped", no_room)
    records = list(on_ray(shared_runs, "cramped on Ray", "runtime.workers=1", no_room))
    assert accuracies(records) == pytest.approx(accuracies(expected), abs=1e-3)
    first, second = shared_runs.params("cramped"), shared_runs.params("cramped on Ray")
    assert all(torch.allclose(first[name], second[name], atol=1e-4) for name in first)
    (told,) = next(record["warnings"] for record in records if record.get("round") == 1)
    assert "more than runtime.cache_mb = 0.001" in told


def test_clients_without_a_server_find_on_ray_what_they_find_in_one_process(shared_runs):
    options = ("algorithm.name=dfedsam", "algorithm.graph=random", "algorithm.compress=quantise", "prompt.init=patches")
    lossy = ("algorithm.link_loss=0.2", "federation.dropout=0.2")
    expected = shared_runs.local("gossip", *options, *lossy)
    records = list(on_ray(shared_runs, "gossip on Ray", "runtime.workers=1", *options, *lossy))
    assert records[-1]["result"]["communication"] == expected[-1]["result"]["communication"]
    here, there = shared_runs.state("gossip"), shared_runs.state("gossip on Ray")
    assert here.clients.keys() == there.clients.keys()
    for client, own in here.clients.items():
        assert all(torch.allclose(value, there.clients[client][name], atol=1e-4) for name, value in own.items())


def test_a_killed_worker_changes_no_bit(two, shared_runs, same_params):
    wait_for_none_of("Worker")
    killed = []
    for record in on_ray(shared_runs, "bereft", "runtime.workers=2", "runtime.cpus_per_worker=0.5"):
        if record.get("round") == 1:
            killed = processes_of("Worker")
            os.kill(killed[0], signal.SIGKILL)
    assert len(killed) == 2
    assert same_params(shared_runs.params("bereft"), shared_runs.params("two"))
    assert shared_runs.lines("bereft") == shared_runs.lines("two")


def test_a_killed_driver_is_replaced_and_changes_no_bit(two, shared_runs, same_params):
    wait_for_none_of("Driver")
    notes, rounds = [], []
    # All of the cluster's cores: the next driver's workers fit in no other places than the dead one's.
    for record in on_ray(shared_runs, "orphaned", "runtime.workers=2", "runtime.cpus_per_worker=1"):
        notes += [record["note"]] if "note" in record else []
        rounds += [record["round"]] if "round" in record else []
        if record.get("round") == 1 and not notes:
            (driver,) = processes_of("Driver")
            os.kill(driver, signal.SIGKILL)
    assert len(notes) == 1
    assert "last checkpoint" in notes[0]
    assert rounds[-1] == 3
    assert len(rounds) - len(set(rounds)) <= 2  # at most what was under way is done again
    assert same_params(shared_runs.params("orphaned"), shared_runs.params("two"))
    assert shared_runs.lines("orphaned") == shared_runs.lines("two")
    assert record["result"]["final"] == two[-1]["result"]["final"]


@pytest.mark.long
def test_a_listener_that_leaves_has_the_run_saved(two, shared_runs, same_params):
    records = on_ray(shared_runs, "left", "runtime.workers=1", "runtime.checkpoint_every=50")
    while next(records).get("round") != 1:
        pass
    records.close()
    wait_for_none_of("Driver")
    rest = shared_runs.local("left")
    assert rest[0].get("round", 4) >= 2
    assert same_params(shared_runs.params("left"), shared_runs.params("two"))
    assert shared_runs.lines("left") == shared_runs.lines("two")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["runtime.workers=5"], "runtime.workers: 5 with 1 CPUs and 0 GPUs each"),
        (["runtime.gpus_per_worker=1"], "runtime.workers"),
        (["prompt.layer=50", "runtime.workers=1"], "prompt.layer"),  # a worker finds out
        (["data.root=/nowhere", "runtime.workers=1"], "data.root"),  # the driver does
    ],
)
def test_bad_input_is_told_in_one_line_wherever_it_is_found_out(runs, capsys, overrides, named):
    with pytest.raises(SystemExit) as end:
        main.main(runs.command("run", *overrides)[3:])
    line = capsys.readouterr().err
    assert end.value.code == 2
    assert line.count("\n") == 1
    assert named in line
    assert not (runs.folder / "run").exists()


def test_a_worker_that_fails_is_told_in_one_line_with_the_rest_in_a_file(tmp_path):
    @ray.remote
    def fails():
        raise FloatingPointError("overflow\nsecond line")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fails.remote())
    line = told(caught.value, tmp_path)
    assert line["code"] == 1
    assert line["error"].startswith("a worker failed (FloatingPointError: overflow); ")
    assert "second line" in (tmp_path / "error.txt").read_text()


def test_a_full_disk_under_the_driver_is_a_failed_run(tmp_path):
    line = told(OSError(28, "No space left on device", "metrics.jsonl"), tmp_path)
    assert line == {"error": "metrics.jsonl: No space left on device", "code": 1}


def test_a_stopped_command_saves_resumes_and_leaves_no_process(runs, shared_runs, same_params, start_process):
    shared_runs.local("long", "federation.rounds=20")
    process = start_process(runs.command("run", "federation.rounds=20", "runtime.workers=1"))
    metrics = runs.folder / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    started = family(process.pid)
    assert any("raylet" in title for title in started.values())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    notes = [line for line in errors.splitlines() if "stopping after the round under way" not in line]
    assert notes == [f"fedprompt: stopped; continue with: fedprompt run --resume --output {runs.folder / 'run'}"]
    assert len(runs.lines("run")) < 21
    wait_until_gone(started)
    runs.local("run", "federation.rounds=20")
    assert same_params(runs.params("run"), shared_runs.params("long"))
    assert runs.lines("run") == shared_runs.lines("long")


def family(pid):
    """Everything that a process has started, and what that has started."""
    found = children(pid)
    return {**found, **{p: title for child in found for p, title in family(child).items()}}


def wait_until_gone(processes):
    def left():
        return [title for pid, title in processes.items() if Path(f"/proc/{pid}/cmdline").exists() and not zombie(pid)]

    deadline = time.monotonic() + 60
    while left():
        assert time.monotonic() < deadline, left()
        time.sleep(0.1)


def zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_rays_own_handler_does_not_take_sigterms_place(runs, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda *_, **__: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    monkeypatch.setattr("fedprompt.runtime.ray.clusters._check_closed", lambda: None)
    with terminated_as_interrupt(), connected(runs.config(), print), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
