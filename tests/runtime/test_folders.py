"""Only what fedprompt wrote is ever replaced, never a user's own file; and no crash in between loses a run."""

import os
import signal

import pytest
import yaml
from commands import cli
from tiny import TINY

from fedprompt.runtime.folders import folders, replacing
from fedprompt.runtime.folders.folders import mark, own_files
from fedprompt.runtime.folders.replacing import OLD, PART, WHOLE, forget, lay_aside, put_back, recover

RUN = {
    **{"config.yaml": "old", "metrics.jsonl": "old", "result.json": "old", "accuracy.png": "old"},
    **{"checkpoints/round_000003.pt": "old", "checkpoints/best.pt": "old", "pools/round_0003.npy": "old"},
    **{"tensorboard/events.out.tfevents.1": "old", "personalize/personalize.csv": "old"},
}
MINE = {
    "notes.txt": "mine",
    "checkpoints/my_model.pt": "mine",
    "tensorboard/notes": "mine",
    "personalize/notes": "mine",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def texts(folder):
    """All files that are no marks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".fedprompt")]
    return {str(path.relative_to(folder)): path.read_text(errors="replace") for path in files}


def overwrite(folder, *arguments):
    return cli("run", *TINY, "federation.rounds=1", *arguments, "--local", "--output", folder, "--overwrite")


# --- a user's own files


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", [*RUN, "error.txt", "checkpoints/round_000003.pt.part", "partition.png"])
def test_a_file_that_no_run_wrote_is_named_and_stays(tmp_path, capsys, name, flag):
    write(tmp_path, {name: "mine"})
    assert cli("run", *TINY, "--local", "--output", tmp_path, *flag) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{tmp_path / name} was not written by a run" in line
    assert "--overwrite" not in line
    assert texts(tmp_path) == {name: "mine"}


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_the_configuration_that_is_given_is_never_replaced(tmp_path, capsys, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"config.yaml": "seed: 3\n", "checkpoints/my_model.pt": "mine"})
    for given in ("config.yaml", tmp_path / "config.yaml"):
        assert cli("run", given, *TINY, "--local", "--output", ".", *flag) == 2
        line = capsys.readouterr().err
        assert (line.count("\n"), "config.yaml" in line, "--overwrite" in line) == (1, True, False)
    mark(tmp_path, "run")  # nor in the folder of a run
    assert cli("run", "config.yaml", *TINY, "--local", "--output", ".", *flag) == 2
    assert "which is given as the configuration" in capsys.readouterr().err
    assert texts(tmp_path) == {"config.yaml": "seed: 3\n", "checkpoints/my_model.pt": "mine"}


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("backbone.weights", "checkpoints/best.pt"),
        ("head.embeddings", "pools/round_0003.npy"),
        ("data.root", "tensorboard"),
    ],
)
def test_what_a_setting_names_is_never_replaced(tmp_path, key, path):
    write(tmp_path, RUN)
    mark(tmp_path, "run")
    given = [(key, tmp_path / path)]
    with pytest.raises(folders.InputError, match=f"{path}, which is given as {key}"):
        folders.check_replaceable(tmp_path, given, overwrite=True)
    assert folders.check_replaceable(tmp_path, [("data.root", tmp_path)], overwrite=True)  # only reads beside


def test_overwriting_replaces_a_runs_files_and_no_others(tmp_path):
    write(tmp_path, RUN | MINE)
    mark(tmp_path, "run")
    assert overwrite(tmp_path) == 0
    after = texts(tmp_path)
    assert {name: after[name] for name in MINE} == MINE
    assert "old" not in after.values()
    assert not (tmp_path / WHOLE).exists()
    assert not (tmp_path / OLD).exists()


def test_another_run_where_personalization_goes_is_not_replaced(tmp_path):
    write(tmp_path, {"config.yaml": "old", "personalize/result.json": "another run's"})
    mark(tmp_path / "personalize", "run")
    assert own_files(tmp_path) == [tmp_path / "config.yaml"]


def test_the_folder_of_a_run_is_not_its_storage(tmp_path, capsys):
    assert cli("run", *TINY, "--local", "--output", tmp_path / "out", f"runtime.storage={tmp_path / 'out'}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"fedprompt: runtime.storage: {tmp_path / 'out'} is the run's own folder; allowed: ")


def test_the_folder_of_a_run_of_an_earlier_version_is_known_by_what_it_holds(tmp_path):
    assert cli("run", *TINY, "federation.rounds=1", "--local", "--output", tmp_path / "run") == 0
    (tmp_path / "run" / ".fedprompt-run").unlink()
    assert overwrite(tmp_path / "run") == 0


def test_resuming_never_takes_a_users_configuration_for_a_runs(tmp_path, capsys):
    write(tmp_path, {"config.yaml": "seed: 3  # mine\n"})
    assert cli("run", "--resume", "--local", "--output", tmp_path) == 2
    assert "was not written by a run" in capsys.readouterr().err
    assert texts(tmp_path) == {"config.yaml": "seed: 3  # mine\n"}


def test_a_partition_replaces_only_its_own_table_and_figure(tmp_path, capsys):
    write(tmp_path, {"partition.csv": "mine"})
    assert cli("partition", *TINY, "--output", tmp_path) == 2
    assert f"{tmp_path / 'partition.csv'} was not written by fedprompt partition" in capsys.readouterr().err
    assert texts(tmp_path) == {"partition.csv": "mine"}
    for _ in range(2):
        assert cli("partition", *TINY, "--output", tmp_path / "other") == 0


# --- crashes in the middle of a replacement


def crash_after(steps, action):
    """Do ``action`` in a process that ends, as by SIGKILL, before the given number of changes of the file system."""
    child = os.fork()
    if child == 0:
        left = [steps]

        def counted(function):
            def change(*arguments, **options):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return function(*arguments, **options)

            return change

        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def begin_anew(output):
    """Replace a run by one that writes its first files and, then, has begun."""
    lay_aside(output, own_files(output))
    write(output, {"config.yaml": "new", "tensorboard/events.out.tfevents.2": "new", "metrics.jsonl": "new\n"})
    os.mkdir(output / "beginning")
    os.rmdir(output / "beginning")
    write(output, {"checkpoints/round_000000.pt": "new"})
    forget(output)


NEW = {
    **{"config.yaml": "new", "tensorboard/events.out.tfevents.2": "new", "metrics.jsonl": "new\n"},
    "checkpoints/round_000000.pt": "new",
}


def test_a_crash_at_any_point_of_a_replacement_leaves_the_old_run_or_the_new_one(tmp_path):
    outcomes = []
    for step in range(200):
        output = tmp_path / f"{step}"
        write(output, RUN | MINE)
        crashed = crash_after(step, lambda output=output: begin_anew(output))
        told = recover(output)
        assert texts(output) in (RUN | MINE, NEW | MINE), step
        assert len(told) <= 1
        assert recover(output) == []
        outcomes.append("old" if texts(output) == RUN | MINE else "new")
        if not crashed:
            break
    assert outcomes == sorted(outcomes, key=["old", "new"].index)  # the old one until the new one has begun
    assert outcomes.count("old") > len(RUN)
    assert outcomes.count("new") > 3


def test_a_crash_while_a_run_is_put_back_costs_nothing_either(tmp_path):
    for step in range(200):
        output = tmp_path / f"{step}"
        write(output, RUN | MINE)
        lay_aside(output, own_files(output))
        write(output, {"config.yaml": "new", "pools/round_0000.npy": "new", "error.txt": "new"})
        crashed = crash_after(step, lambda output=output: put_back(output))
        recover(output)
        assert texts(output) == RUN | MINE, step
        if not crashed:
            break
    assert step > len(RUN)


def test_what_a_crash_left_is_put_in_order_at_the_next_start_and_told_in_a_line(tmp_path, capsys):
    output = tmp_path / "run"
    assert cli("run", *TINY, "federation.rounds=1", "--local", "--output", output) == 0
    capsys.readouterr()
    lay_aside(output, own_files(output))
    write(output, {"config.yaml": yaml.safe_dump({"seed": 9})})  # killed here
    assert cli("run", "--resume", "--local", "--output", output) == 0
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "the run that lay there is back" in line
    (output / PART).mkdir()
    (output / PART).rename(output / OLD)
    write(output, {f"{OLD}/config.yaml": "old"})
    assert cli("run", "--resume", "--local", "--output", output) == 0
    assert "removed what was left of a run" in capsys.readouterr().err
    assert not (output / OLD).exists()


@pytest.mark.parametrize("wrong", ["data.name=cifar10", "runtime.cpus_per_worker=0"])
def test_a_new_run_that_fails_before_it_begins_leaves_the_old_one(tmp_path, wrong):
    write(tmp_path, RUN | MINE)
    mark(tmp_path, "run")
    assert overwrite(tmp_path, wrong) != 0
    assert texts(tmp_path) == RUN | MINE


def test_a_new_run_that_is_interrupted_before_it_begins_leaves_the_old_one(tmp_path, monkeypatch, capsys):
    write(tmp_path, RUN | MINE)
    mark(tmp_path, "run")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedprompt.runtime.worker.Worker.predict", interrupted)
    assert overwrite(tmp_path) == 1
    assert texts(tmp_path) == RUN | MINE
    assert "the new run had not begun; the one that lay there is back" in capsys.readouterr().err
    assert not (tmp_path / replacing.WHOLE).exists()
