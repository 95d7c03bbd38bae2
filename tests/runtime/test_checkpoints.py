"""Stopping loses nothing: a run that was interrupted, killed or cut off goes on as if it never had been."""

import errno
import pickle
import signal
import time

import pytest
import torch
from commands import cli

from fedprompt.algorithms.base import State
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data
from fedprompt.runtime.checkpoints.file import Checkpoint
from fedprompt.runtime.checkpoints.resuming import start_of
from fedprompt.runtime.checkpoints.store import KEEP, CheckpointStore
from fedprompt.runtime.federation import Federation, Stopped
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.run import new_run
from fedprompt.runtime.worker import Worker

LONG = "federation.rounds=20"


@pytest.fixture(scope="module")
def whole(shared_runs):
    """Params, lines and result of a run that was never interrupted."""
    result = shared_runs.local("whole")[-1]["result"]
    return shared_runs.params("whole"), shared_runs.lines("whole"), result


@pytest.fixture(scope="module")
def whole_long(shared_runs):
    """The same of a longer run, which leaves the time to be killed."""
    shared_runs.local("long", LONG)
    return shared_runs.params("long"), shared_runs.lines("long")


def federation(runs, name, *overrides):
    config = runs.config(*overrides)
    data = build_data(config)
    start = start_of(config, runs.folder / name)
    return Federation(config, build_algorithm(config), data, InProcessPool(config, data), start, runs.folder / name)


def begin(runs, name, *overrides):
    """Make the folder of a run as the command line does."""
    with new_run(runs.folder / name, runs.config(*overrides), overwrite=False):
        pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_never_had(runs, whole, same_params, after):
    params, lines, result = whole
    loop = federation(runs, "run", "runtime.checkpoint_every=50")
    records = loop.run()
    while next(records)["round"] != after:
        pass
    loop.stop()
    with pytest.raises(Stopped):
        list(records)
    rest = runs.local("run")
    assert rest[0]["round"] == after + 1
    assert same_params(runs.params("run"), params)
    assert runs.lines("run") == lines
    for part in ("final", "best", "last10", "clients", "pool_size", "communication"):
        assert rest[-1]["result"][part] == result[part]


@pytest.mark.parametrize("round", [1, 2, 3])
def test_an_interrupt_in_the_middle_of_training_leaves_no_trace(runs, whole, same_params, monkeypatch, round):
    train = Worker.train

    def interrupted(self, now, tasks, *examples):
        if now == round:
            raise KeyboardInterrupt
        return train(self, now, tasks, *examples)

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.local("run", "runtime.checkpoint_every=50")
    assert runs.local("run")[0]["round"] == round
    assert same_params(runs.params("run"), whole[0])
    assert runs.lines("run") == whole[1]


def test_an_interrupt_during_the_first_evaluation_leaves_a_run_that_begins_anew(runs, whole, same_params, monkeypatch):
    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Worker, "predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.local("run")
    runs.local("run")
    assert same_params(runs.params("run"), whole[0])
    assert runs.lines("run") == whole[1]


def test_a_listener_that_leaves_in_between_loses_no_round(runs, whole, same_params):
    records = federation(runs, "run", "runtime.checkpoint_every=50").run()
    assert [next(records)["round"] for _ in range(3)] == [0, 1, 2]
    records.close()
    assert runs.local("run")[0]["round"] == 3
    assert same_params(runs.params("run"), whole[0])
    assert runs.lines("run") == whole[1]


def wait_for_round(path, round, process):
    while not path.exists() or path.read_bytes().count(b"\n") <= round:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGKILL, -9)])
def test_a_process_that_is_stopped_or_killed_resumes(runs, whole_long, same_params, start_process, number, code):
    process = start_process(runs.command("run", LONG, "--local"))
    wait_for_round(runs.folder / "run" / "metrics.jsonl", 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(runs.lines("run")) < 21
    if number != signal.SIGKILL:
        assert errors == (
            f"fedprompt: stopped; continue with: fedprompt run --resume --output {runs.folder / 'run'} --local\n"
        )
    assert cli("run", "--resume", "--local", "--output", runs.folder / "run") == 0
    assert same_params(runs.params("run"), whole_long[0])
    assert runs.lines("run") == whole_long[1]


def test_a_resumed_run_may_get_more_rounds(runs, whole, same_params):
    begin(runs, "run", "federation.rounds=2")
    runs.local("run", "federation.rounds=2")
    assert cli("run", "--resume", "--local", "--output", runs.folder / "run", "federation.rounds=3") == 0
    assert same_params(runs.params("run"), whole[0])
    assert runs.lines("run") == whole[1]
    assert "rounds: 3" in (runs.folder / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["seed=1"], "seed"),
        (["local.lr=1e-3"], "local.lr"),
        (["algorithm.sweeps=7"], "algorithm.sweeps"),
        (["algorithm.name=frozen"], "algorithm.name"),
        (["federation.clients=7"], "federation.clients"),
        (["some.yaml"], "some.yaml"),
        (["--overwrite"], "--overwrite"),
    ],
)
def test_what_would_change_the_rounds_so_far_is_refused_on_resume(runs, capsys, arguments, named):
    begin(runs, "run", *(["algorithm.name=fedavg"] if named == "algorithm.name" else []))
    before = (runs.folder / "run" / "config.yaml").read_text()
    assert cli("run", "--resume", "--local", "--output", runs.folder / "run", *arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert named in line
    assert (runs.folder / "run" / "config.yaml").read_text() == before


def test_resuming_what_is_no_run_is_refused(runs, capsys):
    assert cli("run", "--resume", "--local", "--output", runs.folder / "nothing") == 2
    assert "config.yaml is missing" in capsys.readouterr().err
    assert cli("run", "--resume", "--local") == 2
    assert "--output" in capsys.readouterr().err


def test_rounds_whose_checkpoints_are_gone_are_not_thrown_away(runs, capsys):
    begin(runs, "run", "federation.rounds=1")
    runs.local("run", "federation.rounds=1")
    for path in (runs.folder / "run" / "checkpoints").iterdir():
        path.unlink()
    lines = runs.lines("run")
    assert cli("run", "--resume", "--local", "--output", runs.folder / "run") == 2
    assert "checkpoints are gone" in capsys.readouterr().err
    assert runs.lines("run") == lines


class Code:
    """Unpickles by calling ``open`` on a file that is then there."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path, write):
    mark, store = tmp_path / "executed", CheckpointStore(str(tmp_path / "store"))
    write({"round": 1, "state": Code(str(mark)), "totals": {}}, tmp_path / "store" / "round_000001.pt")
    with pytest.raises(InputError, match="not a readable checkpoint") as caught:
        store.latest()
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def some_state(value):
    return State({"prompt": torch.full((3,), value)}, {4: {"head.1": torch.arange(2.0)}}, {"step": 3, "deep": {"a": 1}})


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path):
    store = CheckpointStore(str(tmp_path))
    assert store.latest() is None
    store.save(Checkpoint(7, some_state(2.0), {"up_bytes": 5}))
    found = store.latest()
    assert (found.round, found.totals, found.state.memory) == (7, {"up_bytes": 5}, {"step": 3, "deep": {"a": 1}})
    assert torch.equal(found.state.params["prompt"], torch.full((3,), 2.0))
    assert torch.equal(found.state.clients[4]["head.1"], torch.arange(2.0))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    store = CheckpointStore(str(tmp_path))
    for round in (8, 9, 10, 11):
        store.save(Checkpoint(round, some_state(float(round))))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round_0000{n}.pt" for n in (10, 11)]
    assert len(list(tmp_path.iterdir())) == KEEP
    assert store.latest().round == 11


def test_checkpoints_may_lie_behind_a_uri(tmp_path):
    store = CheckpointStore("memory://somewhere/else")
    store.save(Checkpoint(1, some_state(1.0)))
    assert CheckpointStore("memory://somewhere/else").latest().round == 1
    assert CheckpointStore(f"file://{tmp_path}/new").latest() is None


@pytest.mark.parametrize("uri", ["nosuch://here", "github://a", "dbfs://a/b", "dir://a", "generic://a", "zip://a.zip"])
def test_a_uri_that_nothing_can_be_written_to_is_refused_in_one_line(uri):
    with pytest.raises(InputError, match=rf"^runtime\.storage: cannot use '{uri}' \(..+\); allowed: "):
        CheckpointStore(uri)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_no_half_of_it(tmp_path):
    store = CheckpointStore(str(tmp_path))
    store.save(Checkpoint(1, some_state(1.0)))
    opened = store._fs.open

    def full(path, mode):
        file = opened(path, mode)
        file.write(b"half")
        file.write = lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return file

    store._fs.open = full
    try:
        with pytest.raises(OSError, match="No space left"):
            store.save(Checkpoint(2, some_state(2.0)))
    finally:
        store._fs.open = opened  # fsspec keeps one file system object for all
    assert [path.name for path in tmp_path.iterdir()] == ["round_000001.pt"]
    assert CheckpointStore(str(tmp_path)).latest().round == 1
