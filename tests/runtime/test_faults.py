"""Disks that fill up and files that are damaged: the run ends, or goes on, with one line and the right numbers."""

import errno
import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from commands import cli

from fedprompt.algorithms.base import State
from fedprompt.config.schema import Config, TrackingSection
from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.checkpoints.file import Checkpoint
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import new_run
from fedprompt.tracking import metrics
from fedprompt.tracking.tracking import Tracking

BOARD = "tracking.tensorboard=true"
NO_TRACKERS = Config(tracking=TrackingSection(trackers=()))


@pytest.fixture(scope="module")
def whole(shared_runs):
    """A run that nothing happened to: its params, its lines and the rounds of its pools."""
    shared_runs.local("whole")
    return shared_runs.params("whole"), without_warnings(shared_runs.lines("whole")), pools(shared_runs, "whole")


def without_warnings(lines):
    return [{key: value for key, value in line.items() if key != "warnings"} for line in lines]


def pools(runs, name):
    return {path.name: path.read_bytes() for path in (runs.folder / name / "pools").iterdir()}


def begin(runs, name, *overrides):
    """Run to the end, in a folder as the command line makes it."""
    with new_run(runs.folder / name, runs.config(*overrides), overwrite=False):
        return runs.local(name, *overrides)


def resume(runs, name, *overrides):
    return cli("run", "--resume", "--local", "--output", runs.folder / name, *overrides)


def checkpoint(runs, name, round):
    return runs.folder / name / "checkpoints" / f"round_{round:06d}.pt"


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip(path):
    """Change one byte in the middle: of a tensor's values, as nearly all bytes are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


# --- damaged checkpoints


@pytest.mark.parametrize("damage", [truncate, flip, empty])
def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(runs, whole, capsys, same_params, damage):
    begin(runs, "run")
    damage(checkpoint(runs, "run", 3))
    assert resume(runs, "run") == 0
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{checkpoint(runs, 'run', 3)}: not a readable checkpoint" in told
    assert "went on from round 2" in told
    assert same_params(runs.params("run"), whole[0])
    assert without_warnings(runs.lines("run")) == whole[1]
    assert pools(runs, "run") == whole[2]
    warnings = [line.get("warnings", []) for line in runs.lines("run")]
    assert ["round_000003.pt" in " ".join(lines) for lines in warnings] == [False, False, False, True]


def test_lines_and_pools_are_cut_back_to_the_checkpoint_that_serves(runs, monkeypatch):
    begin(runs, "run")
    truncate(checkpoint(runs, "run", 3))
    with monkeypatch.context() as patched:
        patched.setattr("fedprompt.runtime.worker.Worker.train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runs.local("run")
    assert [line["round"] for line in runs.lines("run")] == [0, 1, 2]
    assert sorted(pools(runs, "run")) == ["round_0000.npy", "round_0001.npy", "round_0002.npy"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_where_all_checkpoints_are_damaged_nothing_is_touched(runs, capsys):
    begin(runs, "run")
    lines = runs.lines("run")
    for round in (2, 3):
        truncate(checkpoint(runs, "run", round))
    assert resume(runs, "run") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "round_000003.pt: not a readable checkpoint" in told
    assert "--overwrite" in told
    assert runs.lines("run") == lines
    assert checkpoint(runs, "run", 2).exists()
    assert checkpoint(runs, "run", 3).exists()


def saved(store, *rounds):
    for round in rounds:
        store.save(Checkpoint(round, State({"prompt": torch.full((3,), float(round))})))


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    store = CheckpointStore(str(tmp_path))
    saved(store, 4, 5)
    newest = tmp_path / "round_000005.pt"
    newest.write_bytes(newest.read_bytes()[:-200])
    assert store.latest().round == 4
    assert list(store.damaged) == [str(newest)]
    assert newest.exists()  # reading deletes nothing
    saved(store, 6)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round_000004.pt", "round_000006.pt"]


def test_a_round_that_is_done_again_replaces_its_damaged_checkpoint(tmp_path):
    store = CheckpointStore(str(tmp_path))
    saved(store, 4, 5)
    empty(tmp_path / "round_000005.pt")
    assert store.latest().round == 4
    saved(store, 5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["round_000004.pt", "round_000005.pt"]
    assert CheckpointStore(str(tmp_path)).latest().round == 5


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name_and_the_name_afterwards(tmp_path, monkeypatch):
    store, order = CheckpointStore(str(tmp_path)), []
    sync, move = os.fsync, store._fs.mv

    def fsync(number):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(store._fs, "mv", lambda *paths: (order.append("rename"), move(*paths)))
    saved(store, 1)
    assert order == ["round_000001.pt.part", "rename", tmp_path.name]


# --- full disks


@contextmanager
def no_file_above(size):
    """Let this process write no file beyond ``size`` bytes: the system then refuses, as with a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_harms_no_earlier_one(runs, whole, same_params):
    begin(runs, "run", "federation.rounds=1")
    with no_file_above(100_000), pytest.raises(RunFailed) as caught:
        runs.local("run")
    told = str(caught.value)
    best = runs.folder / "run" / "checkpoints" / "best.pt"  # round 2 is better, and the models of the best come first
    assert f"{best}: {os.strerror(errno.EFBIG)}" in told
    assert CheckpointStore(str(best.parent)).best().round == 1
    assert "--resume goes on from round 1" in told
    assert "\n" not in told
    names = [path.name for path in sorted((runs.folder / "run" / "checkpoints").iterdir())]
    assert names == ["best.pt", "round_000000.pt", "round_000001.pt"]
    assert resume(runs, "run", "federation.rounds=3") == 0
    assert same_params(runs.params("run"), whole[0])
    assert without_warnings(runs.lines("run")) == whole[1]


def test_rounds_since_the_last_checkpoint_are_saved_when_only_a_line_cannot_be_written(runs, whole, monkeypatch):
    begin(runs, "run", "federation.rounds=1")
    append = metrics.MetricsFile.append

    def full(self, record):
        if record["round"] == 3:
            with no_file_above(self.path.stat().st_size + 20):
                append(self, record)
        append(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(metrics.MetricsFile, "append", full)
        with pytest.raises(RunFailed, match=r"metrics\.jsonl: "):
            runs.local("run", "runtime.checkpoint_every=50")
    assert checkpoint(runs, "run", 2).exists()
    assert not (runs.folder / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")  # half a line
    assert resume(runs, "run", "federation.rounds=3") == 0
    assert without_warnings(runs.lines("run")) == whole[1]


@pytest.fixture
def disk(tmp_path):
    """A disk that is given its size with ``disk(kilobytes)``; skips where none can be made."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def resize(kilobytes):
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "fedprompt-test", str(place)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small disk here (needs root)")
        mounted.append(place)
        return place

    yield resize
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


# what there is no room for: the first event file, the first pool, the first checkpoint, the third, the last figures
@pytest.mark.parametrize("kilobytes", [40, 76, 100, 580, 650])
def test_a_run_whose_disk_fills_up_ends_with_one_line_and_goes_on_when_there_is_room(
    disk, runs, whole, same_params, capfd, kilobytes
):
    runs.folder = disk(kilobytes)
    assert cli(*runs.command("run", BOARD, "--local")[3:]) == 1
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"fedprompt: {runs.folder}/run/")
    assert os.strerror(errno.ENOSPC) in told
    assert "--resume" in told
    assert not list(runs.folder.rglob("*.part"))
    disk(4000)
    assert resume(runs, "run") == 0
    assert same_params(runs.params("run"), whole[0])
    assert without_warnings(runs.lines("run")) == whole[1]
    assert json.loads((runs.folder / "run" / "result.json").read_text())["rounds"] == 3


def test_a_torn_line_is_taken_away_before_the_next_is_appended(tmp_path):
    tracker = Tracking(tmp_path, NO_TRACKERS)
    tracker.round({"round": 1}, {})
    with (
        pytest.raises(OSError, match=r"metrics\.jsonl"),
        no_file_above((tmp_path / "metrics.jsonl").stat().st_size + 5),
    ):
        tracker.round({"round": 2}, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"round": 1}\n{"rou'
    Tracking(tmp_path, NO_TRACKERS, resume_round=1).round({"round": 2}, {})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"round": 1}\n{"round": 2}\n'


def test_damage_to_a_store_that_is_not_a_disk_is_found_too():
    store = CheckpointStore("memory://faults/store")
    saved(store, 1)
    store._fs.pipe("/faults/store/round_000002.pt", b"no checkpoint")
    assert store.latest().round == 1
    store._fs.rm_file("/faults/store/round_000001.pt")
    with pytest.raises(InputError, match="nor is any other"):
        store.latest()
