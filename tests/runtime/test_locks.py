"""One command at a time writes to a folder: who comes second is told who is there, and no crash locks anybody out."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import fsspec
import pytest
from commands import cli
from tiny import TINY

from fedprompt.errors import InputError, RunFailed
from fedprompt.runtime.folders import folder_lock, leases, locks
from fedprompt.runtime.folders.holders import LOCK, Holder, InUse, is_unused
from fedprompt.runtime.folders.locks import Held, entered
from fedprompt.tracking import metrics

FORK = multiprocessing.get_context("fork")
HOLD = """
import sys, time
from fedprompt.runtime.folders.locks import entered
with entered(__import__("pathlib").Path(sys.argv[1]), "--output", "fedprompt run"):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``run``."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def enter(place, command="fedprompt run"):
    with entered(place, "--output", command) as lock:
        return lock.place


# --- the system's lock


def test_a_folder_in_use_is_refused_in_one_line_that_says_by_whom(tmp_path, holder):
    with pytest.raises(InUse) as refused:
        enter(tmp_path / "run")
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"--output: {tmp_path / 'run'} is in use by 'fedprompt run' (process {holder.pid} on ")
    assert f"since {datetime.now():%Y-%m-%d}" in line


def test_a_killed_holder_leaves_nothing_in_the_way(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert is_unused(tmp_path / "run")
    enter(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []  # the folder is the killed one's: it stays, without the lock file


@pytest.mark.parametrize("deleted", ["the lock file", "the folder"])
def test_who_deletes_a_lock_file_lets_nobody_in(tmp_path, deleted):
    folder = tmp_path / "run"
    with entered(folder, "--output", "fedprompt run") as lock:
        (folder / LOCK).unlink()
        if deleted == "the folder":
            folder.rmdir()
            with pytest.raises(RunFailed, match="removed or replaced"):
                lock.check()
            folder.mkdir()
            with pytest.raises(RunFailed, match="removed or replaced"):
                lock.check()
        else:
            with pytest.raises(InUse, match="another process"):
                enter(folder)
            lock.check()


def _race(folder, start, entries):
    start.wait()
    try:
        with entered(folder, "--output", "fedprompt run"):
            entries.put("in")
            time.sleep(0.5)
    except InUse:
        entries.put("refused")


def test_of_two_that_start_together_exactly_one_enters(tmp_path):
    for pair in range(10):
        start, entries = FORK.Event(), FORK.Queue()
        processes = [FORK.Process(target=_race, args=(tmp_path / f"{pair}" / "new", start, entries)) for _ in range(2)]
        for process in processes:
            process.start()
        start.set()
        assert sorted(entries.get(timeout=60) for _ in processes) == ["in", "refused"]
        for process in processes:
            process.join()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    enter(tmp_path / "new" / "run")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        enter(tmp_path / "file")


# --- a process that writes for a command, as the driver of a run on Ray


def passed_on(folder):
    """What a command that is killed while it holds ``folder`` has told its driver, and the driver's hold."""
    with entered(folder, "--output", "fedprompt run") as lock:
        return Held(lock).passed_on()


def test_a_driver_writes_only_while_its_command_lives_and_holds_the_folder(tmp_path, holder):
    told = Holder.parse((tmp_path / "run" / LOCK).read_bytes())
    tickets = locks.PassedOn((locks.Ticket(str(tmp_path / "run"), told, False),))
    with tickets.joined() as held:
        held.check()
        holder.kill()
        holder.wait()
        with pytest.raises(RunFailed, match=rf"process {holder.pid} .* has ended"):
            held.check()
    with pytest.raises(RunFailed, match="has ended"), tickets.joined():
        pass


def test_a_driver_of_another_session_may_not_write(tmp_path):
    earlier = passed_on(tmp_path)
    with (
        entered(tmp_path, "--output", "fedprompt run --resume"),
        pytest.raises(RunFailed, match=r"'fedprompt run --resume' .* has taken it over"),
        earlier.joined(),
    ):
        pass


def test_the_next_command_waits_until_a_killed_ones_driver_has_ended(tmp_path, holder, monkeypatch):
    folder = tmp_path / "run"
    told = Holder.parse((folder / LOCK).read_bytes())
    driver = folder_lock.Joined(folder, told)
    holder.kill()
    holder.wait()
    with monkeypatch.context() as patched:
        patched.setattr(folder_lock, "ORPHANS_END", 0.1)
        with pytest.raises(InUse, match="writes on although its command died"):
            enter(folder)
    threading.Timer(0.3, driver.release).start()
    enter(folder)


# --- the lease


class Clock:
    """A storage whose clock the test sets; ``memory://`` files get its time when they are written."""

    def __init__(self, fs):
        self.now, self._fs = datetime(2026, 1, 1, tzinfo=timezone.utc), fs

    def pass_(self, seconds):
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch):
    """The clock of ``memory://``; nothing waits."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    clock = Clock(fs)
    pipe = type(fs).pipe_file

    def pipe_file(self, path, value, **options):
        pipe(self, path, value, **options)
        self.store[self._strip_protocol(path)].modified = clock.now

    monkeypatch.setattr(type(fs), "pipe_file", pipe_file)
    monkeypatch.setattr(leases, "SETTLES", 0.0)
    yield clock
    fs.store.clear()


STORE = "memory://locks/store"


def elsewhere(command, monkeypatch):
    """A lease of a process on another host, of which this one cannot know whether it lives."""
    lease = leases.Lease(STORE, "runtime.storage", Holder.here(command))
    lease.holder = Holder(**{**vars(lease.holder), "machine": "another", "host": "far"})
    return lease.acquire()


def test_a_lease_lets_nobody_in_until_it_expires_by_the_storages_clock(clock, monkeypatch):
    lost = elsewhere("fedprompt run", monkeypatch)
    clock.pass_(leases.EXPIRES - 1)
    with pytest.raises(InUse, match=r"runtime\.storage: memory://locks/store is in use by 'fedprompt run' .* on far"):
        elsewhere("fedprompt run --resume", monkeypatch)
    clock.pass_(2)
    new = elsewhere("fedprompt run --resume", monkeypatch)
    new.check()
    with pytest.raises(RunFailed, match=r"'fedprompt run --resume' .* has taken it over"):
        lost.check()
    lost.release()
    new.check()  # who has lost a lease takes nobody's away
    new.release()
    assert not fsspec.filesystem("memory").exists(f"/locks/store/{LOCK}")


def test_a_lease_that_is_renewed_does_not_expire(clock, monkeypatch):
    lease = elsewhere("fedprompt run", monkeypatch)
    for _ in range(5):
        clock.pass_(leases.EXPIRES - 1)
        lease.check()
    clock.pass_(leases.EXPIRES - 1)
    with pytest.raises(InUse):
        elsewhere("fedprompt run", monkeypatch)
    lease.release()


def test_a_lease_is_renewed_while_nothing_is_written(clock, monkeypatch):
    monkeypatch.setattr(leases, "RENEWED", 0.01)
    lease = elsewhere("fedprompt run", monkeypatch)
    clock.pass_(leases.EXPIRES + 1)
    store = fsspec.filesystem("memory").store
    while store[f"/locks/store/{LOCK}"].modified != clock.now:
        time.sleep(0.01)
    lease.release()


def test_the_lease_of_a_process_that_was_killed_here_is_free_at_once(clock):
    process = subprocess.Popen(["sleep", "60"])
    dead = Holder(**{**vars(Holder.here("fedprompt run")), "process": process.pid, "started": "1"})
    process.kill()
    process.wait()
    fsspec.filesystem("memory").pipe_file(f"/locks/store/{LOCK}", dead.content())
    enter(STORE)


def test_a_lease_that_somebody_deletes_is_taken_again(clock, monkeypatch):
    lease = elsewhere("fedprompt run", monkeypatch)
    fsspec.filesystem("memory").rm_file(f"/locks/store/{LOCK}")
    lease.check()
    with pytest.raises(InUse):
        elsewhere("fedprompt run", monkeypatch)
    lease.release()


def test_of_two_that_overwrite_each_other_the_last_one_has_the_lease(clock, monkeypatch):
    other = Holder.here("fedprompt sweep")
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(leases.time, "sleep", lambda s: memory.pipe_file(f"/locks/store/{LOCK}", other.content()))
    with pytest.raises(InUse, match="'fedprompt sweep'"):
        enter(STORE)


def test_a_run_whose_lease_is_taken_stops_with_one_line_and_saves_nothing_more(clock, tmp_path, capsys, monkeypatch):
    storage = "memory://locks/run"
    append = metrics.MetricsFile.append

    def taken(self, record):
        append(self, record)
        if record["round"] == 1:
            other = Holder.here("fedprompt run --resume")
            fsspec.filesystem("memory").pipe_file(f"/locks/run/{LOCK}", other.content())

    monkeypatch.setattr(metrics.MetricsFile, "append", taken)
    code = cli("run", *TINY, f"runtime.storage={storage}", "--local", "--output", tmp_path / "run")
    line = capsys.readouterr().err
    assert (code, line.count("\n")) == (1, 1), line
    assert "memory://locks/run: 'fedprompt run --resume'" in line
    names = [Path(name).name for name in fsspec.filesystem("memory").ls("/locks/run", detail=False)]
    assert "round_000000.pt" in names
    assert "round_000001.pt" not in names


@pytest.mark.parametrize(
    ("kind", "shared"), [("ext4", False), ("tmpfs", False), ("nfs4", True), ("fuse.sshfs", True), ("lustre", True)]
)
def test_which_folders_other_hosts_may_write_to(tmp_path, monkeypatch, kind, shared):
    lines = f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {tmp_path}/my\\040disk rw shared:1 - {kind} there rw\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **how: lines if "mountinfo" in str(self) else read(self, **how))
    assert locks.is_shared(tmp_path / "my disk" / "runs" / "a") == shared
    assert not locks.is_shared(tmp_path / "my disk2")


def test_a_shared_folder_is_held_by_a_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "is_shared", lambda folder: True)
    monkeypatch.setattr(leases, "SETTLES", 0.0)
    with entered(tmp_path / "run", "--output", "fedprompt run") as lock:
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
        with pytest.raises(InUse, match="5 minutes"):
            enter(tmp_path / "run")
        lock.check()
    assert is_unused(tmp_path / "run")


# --- commands


@pytest.fixture
def running(runs, start_process):
    """A run in a process of its own that is in the middle of its rounds."""
    process = start_process(runs.command("run", "algorithm.name=fedavg", "federation.rounds=4000", "--local"))
    lines = runs.folder / "run" / "metrics.jsonl"
    while not lines.exists() or lines.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def test_a_folder_with_a_run_under_way_is_refused_by_every_command_and_stays_whole(runs, running, capsys, tmp_path):
    running.send_signal(signal.SIGSTOP)  # it holds the folder all the same, and nothing changes in between
    folder = runs.folder / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("space: {seed: {grid: [0, 1]}}\n")
    commands = [
        ("run", *TINY, "--local", "--output", folder),
        ("run", *TINY, "--local", "--output", folder, "--overwrite"),
        ("run", "--resume", "--local", "--output", folder),
        ("run", *TINY, f"runtime.storage={folder / 'checkpoints'}", "--local", "--output", tmp_path / "other"),
        ("personalize", folder, "--local"),
        ("sweep", sweep, *TINY, "--output", folder),
    ]
    for command in commands:
        assert cli(*command) == 2, command
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        assert f"is in use by 'fedprompt run' (process {running.pid} on " in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "other").exists()
    assert cli("report", folder, "--output", tmp_path / "report") == 2  # it reads, and finds no finished run
    assert "in use" not in capsys.readouterr().err


def test_of_two_runs_that_resume_one_folder_one_goes_on_and_rounds_are_there_once(runs, running, start_process):
    running.kill()
    running.communicate()
    done = len(runs.lines("run"))
    resume = [*runs.command("run")[:3], "run", "--resume", "--local", "--output", str(runs.folder / "run")]
    both = [start_process([*resume, f"federation.rounds={4000}"]) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.05)
    refused, other = sorted(both, key=lambda process: process.poll() is None)
    _, errors = refused.communicate()
    assert (refused.returncode, errors.count("\n")) == (2, 1), errors
    assert f"is in use by 'fedprompt run' (process {other.pid} on " in errors
    while len(runs.lines("run")) <= done + 1:
        assert other.poll() is None, other.communicate()
        time.sleep(0.05)
    other.send_signal(signal.SIGTERM)
    other.communicate()
    rounds = [line["round"] for line in runs.lines("run")]
    assert rounds == list(range(len(rounds)))
