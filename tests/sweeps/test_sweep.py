"""A sweep runs every trial as an ordinary run, tells what became of each, and goes on where it was interrupted."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import TINY

pytest.importorskip("ray")

from fedprompt.cli import main
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.personalization import personalize as personalizing
from fedprompt.runtime.run import run_in_process
from fedprompt.sweeps import trial as trials
from fedprompt.sweeps.outcomes import Outcomes, read_endings, summary
from fedprompt.sweeps.space import expand
from fedprompt.sweeps.sweep import _so_far, _Watch, planned, resumed, run
from fedprompt.tracking import metrics

pytestmark = pytest.mark.ray
HALF = "runtime.cpus_per_worker=0.5"


def sweep_file(folder, **keys):
    """A sweep of tiny runs; what they share is given as overrides."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False))
    return path


def sweep(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def table(output):
    return pd.read_csv(output / "results.csv").set_index("trial")


def lines(folder):
    """Lines of metrics.jsonl without what a clock says."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read(folder / "metrics.jsonl")]


def run_alone(config_file, folder):
    """The ordinary run of a trial's configuration, in this process."""
    torch.set_num_threads(1)
    return list(run_in_process(load(config_file), folder))[-1]["result"]


@pytest.fixture(scope="module")
def mixed(small_cluster, tmp_path_factory):
    """A sweep of four trials, of which two ask for more images per client than there are."""
    folder = tmp_path_factory.mktemp("mixed")
    space = {"algorithm.name": {"grid": ["fedavg", "head"]}, "partition.min_size": {"grid": [4, 400]}}
    overrides = [*(key for key in TINY if "min_size" not in key), "tracking.tensorboard=true", HALF]
    end = sweep(sweep_file(folder, about="four", space=space), *overrides, "--output", folder / "out")
    return end, folder / "out"


DONE = ["000-fedavg-min_size4", "002-head-min_size4"]
FAILED = ["001-fedavg-min_size400", "003-head-min_size400"]


def test_a_failing_trial_is_told_and_the_others_end(mixed):
    end, output = mixed
    rows = table(output)
    assert end.exit_code == 1, end.output
    assert list(rows.index) == sorted(DONE + FAILED)
    assert dict(rows.status) == {**dict.fromkeys(DONE, "done"), **dict.fromkeys(FAILED, "failed")}
    assert rows.reason[DONE].isna().all()
    assert rows.reason[FAILED].str.startswith("partition.min_size: 400 for each of 6 clients").all()
    for name in FAILED:
        assert f"{name} failed: partition.min_size: 400" in end.stderr
        assert (output / name / "error.txt").read_text().startswith("partition.min_size: 400")
    assert "[4/4] " in end.stderr
    assert end.stdout.splitlines()[0] == "fedprompt: starting Ray"
    assert end.stdout.splitlines()[1].split()[:2] == ["trial", "status"]
    assert f"{output}/results.csv" in end.stdout


@pytest.mark.parametrize("name", DONE)
def test_a_trial_is_the_ordinary_run_of_its_configuration(mixed, tmp_path, name):
    _, output = mixed
    alone = run_alone(output / name / "config.yaml", tmp_path / "alone")
    assert lines(output / name) == lines(tmp_path / "alone")
    row = table(output).loc[name]
    for part in ("best", "final", "last10"):
        assert row[f"{part}_accuracy"] == pytest.approx(alone[part]["accuracy"])
        assert row[f"{part}_validation_accuracy"] == pytest.approx(alone[part]["validation_accuracy"])
    assert row["client_mean_accuracy"] == pytest.approx(alone["clients"]["mean_accuracy"])
    assert (row["up_bytes"], row["down_bytes"]) == (
        alone["communication"]["up_bytes"],
        alone["communication"]["down_bytes"],
    )
    assert row["rounds"] == 2
    assert row["partition.min_size"] == 4
    assert {path.name for path in (output / name).iterdir()} >= {"result.json", "checkpoints", "accuracy.png"}


def test_tensorboard_has_each_curve_once_and_swept_values_in_the_same_run(mixed):
    _, output = mixed
    events = {path.parent for path in output.rglob("events.out.tfevents.*")}
    assert events == {output / name / "tensorboard" for name in DONE}
    seen = EventAccumulator(str(output / DONE[0] / "tensorboard")).Reload()
    assert len(seen.Scalars("accuracy/test")) == 3
    row = table(output).loc[DONE[0]]
    assert seen.Scalars("hparams/last10_accuracy")[0].value == pytest.approx(row["last10_accuracy"])
    content = seen.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    swept = HParamsPluginData.FromString(content).session_start_info.hparams
    assert swept["algorithm.name"].string_value == "fedavg"
    assert swept["partition.min_size"].number_value == 4


def test_resuming_tries_failed_trials_again_and_leaves_the_others_alone(mixed, tmp_path):
    _, output = mixed
    before = {name: (output / name / "result.json").stat().st_mtime_ns for name in DONE}
    end = sweep("--resume", "--output", output)
    assert end.exit_code == 1
    assert "2 of 4 trials to run" in end.stderr
    assert {name: (output / name / "result.json").stat().st_mtime_ns for name in DONE} == before
    assert list(table(output).status) == ["done", "failed", "done", "failed"]
    refused = sweep(output / "sweep.yaml", "--output", output)
    assert (refused.exit_code, refused.stderr.count("\n"), refused.stdout) == (2, 1, "")
    assert "allowed: --resume, or another folder" in refused.stderr


@pytest.mark.long
def test_asha_stops_a_trial_that_does_badly_on_the_validation_split(small_cluster, tmp_path):
    path = sweep_file(
        tmp_path,
        space={"local.lr": {"grid": [1e-2, 1e-9]}},
        scheduler="asha",
        grace_rounds=1,
        reduction=2,
        max_concurrent=1,
    )
    output = tmp_path / "out"
    end = sweep(path, *TINY, "algorithm.name=head", "federation.rounds=30", HALF, "--output", output)
    assert end.exit_code == 0, end.output
    good, bad = table(output).itertuples()
    assert (good.status, bad.status) == ("done", "stopped")
    assert good.rounds == 30
    assert 1 <= bad.rounds < 30
    assert not (output / bad.Index / "result.json").exists()
    assert "0 of 2 trials to run" in sweep("--resume", "--output", output).stderr
    assert list(table(output).status) == ["done", "stopped"]


def test_clients_are_personalized_after_every_run_where_the_sweep_says_so(small_cluster, tmp_path):
    how = {"lr": [0.01], "epochs": 1}
    path = sweep_file(tmp_path, space={"algorithm.name": {"grid": ["fedsgd"]}}, personalize=how)
    output, run_folder = tmp_path / "out", tmp_path / "out" / "000-fedsgd"
    end = sweep(path, *TINY, HALF, "--output", output)
    assert end.exit_code == 0, end.output
    rows = table(output)
    assert list(rows.status) == ["done"]
    torch.set_num_threads(1)
    plan = personalizing.planned(run_folder, ["personalize.lr=0.01", "personalize.epochs=1"], tmp_path / "alone")
    alone = personalizing.run(plan, local=True, say=print)
    for kind in ("start", "most_personal", "balanced", "interpolated"):
        for accuracy in ("personal_accuracy", "robust_accuracy"):
            assert rows[f"{kind}_{accuracy}"].item() == pytest.approx(alone[kind][accuracy])
    assert rows.most_personal_lr.item() == 0.01

    (run_folder / "personalize" / "result.json").unlink()  # as if it had been stopped in between
    before = (run_folder / "metrics.jsonl").read_bytes()
    again = sweep("--resume", "--output", output)
    assert "1 of 1 trial to run" in again.stderr
    assert list(table(output).status) == ["done"]
    assert table(output).balanced_robust_accuracy.equals(rows.balanced_robust_accuracy)
    assert (run_folder / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_sweep_goes_on_where_it_was(small_cluster, tmp_path):
    space = {"seed": {"grid": [0, 1]}}
    path, output = sweep_file(tmp_path, space=space, max_concurrent=1), tmp_path / "out"
    overrides = [*TINY, "algorithm.name=fedavg", "federation.rounds=15", HALF]
    command = [sys.executable, "-m", "fedprompt", "sweep", str(path), *overrides, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    first = output / "000-seed0"
    while not (first / "metrics.jsonl").exists() or len(metrics.read(first / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == (
        f"fedprompt: stopped; continue with: fedprompt sweep --resume --output {output}"
    ), errors
    assert list(table(output).status) == ["interrupted", "pending"]
    reached = table(output).rounds["000-seed0"]

    end = sweep("--resume", "--output", output)
    assert end.exit_code == 0, end.output
    assert list(table(output).status) == ["done"] * 2
    run_alone(first / "config.yaml", tmp_path / "alone")
    assert lines(first) == lines(tmp_path / "alone")
    assert 2 <= reached < 15


def test_trials_that_do_not_fit_the_cluster_are_refused_before_anything_is_written(small_cluster, tmp_path):
    path, output = sweep_file(tmp_path, space={"seed": {"grid": [0, 1]}}), tmp_path / "out"
    with pytest.raises(InputError, match=r"runtime\.workers: 5 with 1 CPUs"):
        run(planned(path, [*TINY, "runtime.workers=5"], output), print, print)
    assert not output.exists()


@pytest.fixture
def plan(tmp_path):
    """A sweep of two trials that has not begun."""
    return planned(sweep_file(tmp_path, space={"seed": {"grid": [0, 1]}}), TINY, tmp_path / "out")


def test_a_killed_sweep_knows_its_trials_by_their_folders(plan):
    names = [trial.name for trial in plan.trials]
    plan.output.mkdir()
    outcomes = Outcomes(plan.output, plan.trials)
    for trial in plan.trials:
        outcomes.set(trial, "running")
    outcomes.write()  # and killed here
    assert read_endings(plan.output) == dict.fromkeys(names, ("running", ""))
    (plan.output / names[1]).mkdir()
    (plan.output / names[1] / "result.json").write_text("{}")
    again = _so_far(SimpleNamespace(output=plan.output, trials=plan.trials, file=plan.file))
    assert [again.status(trial) for trial in plan.trials] == ["pending", "done"]


def test_only_where_a_sweep_runs_may_change_on_resume(plan):
    plan.output.mkdir()
    (plan.output / "sweep.yaml").write_text(plan.file.to_yaml())
    assert expand(plan.file) == resumed(plan.output, None, []).trials
    changed = resumed(plan.output, None, ["runtime.workers=2"])
    assert [trial.config.runtime.workers for trial in changed.trials] == [2, 2]
    with pytest.raises(InputError, match=r"federation\.rounds=9: cannot change on --resume"):
        resumed(plan.output, None, ["federation.rounds=9"])
    with pytest.raises(InputError, match="leave out"):
        resumed(plan.output, plan.output / "sweep.yaml", [])


@pytest.mark.parametrize("key", ["local.lr", "federation.rounds", "data.limit"])
def test_a_sweep_whose_file_was_edited_takes_no_trial_of_the_one_before_for_its_own(plan, key):
    plan.output.mkdir()
    (plan.output / "sweep.yaml").write_text(plan.file.to_yaml())
    config, folder = plan.trials[1].config, plan.output / plan.trials[1].name
    folder.mkdir()
    section, name = key.split(".")
    other = getattr(config, section).model_copy(update={name: 7})
    (folder / "config.yaml").write_text(config.model_copy(update={section: other}).to_yaml())
    with pytest.raises(InputError, match=rf"^{key}: found .*, but {folder}/config\.yaml has 7") as caught:
        resumed(plan.output, None, [])
    assert "\n" not in str(caught.value)


def test_a_storage_with_checkpoints_of_another_sweep_is_refused(tmp_path):
    path = sweep_file(tmp_path, space={"seed": {"grid": [0, 1]}})
    taken = tmp_path / "storage" / "001-seed1"
    taken.mkdir(parents=True)
    (taken / "round_000001.pt").touch()
    with pytest.raises(InputError, match=r"runtime\.storage: .*001-seed1 holds checkpoints already"):
        planned(path, [*TINY, f"runtime.storage={tmp_path / 'storage'}"], tmp_path / "out")


def test_notes_about_the_data_are_told_once_for_all_trials(plan, monkeypatch):
    """Of what is not read, a sweep tells as a run does."""
    records = [{"note": "PHOTOS: not read: folders"}, {"round": 0}, {"round": 1}, {"round": 2}, {"result": {}}]
    monkeypatch.setattr(trials, "Driver", lambda *given: SimpleNamespace(run=lambda: (yield from records)))
    monkeypatch.setattr(trials, "get_current_placement_group", lambda: None)
    reports, said = [], []
    monkeypatch.setattr(trials.tune, "report", reports.append)
    plan.output.mkdir()
    watch = _Watch(Outcomes(plan.output, plan.trials), said.append)
    for trial in plan.trials:
        last = trials._run(trial, plan.output / trial.name, None)
        for report in [*reports, last]:
            watch.on_trial_result(1, [], SimpleNamespace(config={"trial": trial.number}), report)
    assert said == ["PHOTOS: not read: folders"]


def test_a_run_without_rounds_has_an_empty_row():
    row = summary([])
    assert (row["best_accuracy"], row["rounds"], row["up_bytes"]) == (None, 0, 0)
