"""`fp.run` and `fp.load_run`: the same as the command, from Python."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from api_settings import settings
from commands import cli
from tiny import TINY

import fedprompt as fp
from fedprompt.runtime.checkpoints.store import store_of

FEDAVG = ("algorithm.name=fedavg", "federation.rounds=3")


def params(folder):
    """The params of a run's newest checkpoint."""
    return store_of(None, Path(folder)).latest().state.params


def without_times(folder):
    """Lines of metrics.jsonl but for what the clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def test_a_run_from_python_equals_the_commands(tmp_path, finished):
    assert cli("run", *TINY, *FEDAVG, "--local", "--output", tmp_path / "r") == 0
    before, now = params(tmp_path / "r"), params(finished.folder)
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert without_times(tmp_path / "r") == without_times(finished.folder)
    assert (tmp_path / "r" / "config.yaml").read_text() == (finished.folder / "config.yaml").read_text()


def test_metrics_have_a_row_per_round_and_a_column_per_number(finished):
    assert list(finished.metrics.index) == [0, 1, 2, 3]
    assert finished.metrics.index.name == "round"
    assert finished.metrics["test.accuracy"].iloc[-1] == finished.result["final"]["accuracy"]
    assert finished.result["rounds"] == 3
    assert not finished.stopped


def test_settings_come_as_a_dict_a_file_or_a_config(tmp_path, finished):
    nested = {"federation": {"rounds": np.int64(1)}, "algorithm.name": "fedavg", "data.name": "digits"}
    file = tmp_path / "c.yaml"
    file.write_text("federation: {rounds: 1}\nalgorithm: {name: fedavg}\ndata: {name: digits}\n")
    from fedprompt.api.running import settings_from

    assert settings_from(nested) == settings_from(str(file)) == settings_from(file)
    assert settings_from(finished.config) == finished.config
    assert settings_from(None).algorithm.name == "pfpt"


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"algorithm.nam": "x"}, r"^algorithm\.nam: unknown key .*did you mean 'name'"),
        ({"federation.rounds": 0}, r"^federation\.rounds: found 0"),
        ({"federation": {"rounds": True}}, r"^federation\.rounds: found True; allowed: a whole number"),
        ({"": 1}, "^config: found the key ''"),
        ({3: 1}, "^config: found the key 3"),
        (["rounds=3"], r"^config: found \["),
        ("missing.yaml", "^missing.yaml: "),
    ],
)
def test_bad_input_is_an_error_of_one_line(tmp_path, config, line):
    with pytest.raises(fp.InputError, match=line) as caught:
        fp.run(config, output=tmp_path / "r", local=True)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_folder_that_holds_a_run_is_refused_resumed_or_overwritten(tmp_path):
    small = settings(*FEDAVG, "federation.rounds=1")
    first = fp.run(small, output=tmp_path / "r", local=True)
    with pytest.raises(fp.InputError, match="holds a run already"):
        fp.run(small, output=tmp_path / "r", local=True)
    longer = fp.run({"federation.rounds": 2}, output=tmp_path / "r", local=True, resume=True)
    assert list(longer.metrics.index) == [0, 1, 2]
    again = fp.run({**small, "seed": 4}, output=tmp_path / "r", local=True, overwrite=True)
    assert list(again.metrics.index) == [0, 1]
    assert again.config.seed == 4
    assert first.folder == again.folder
    with pytest.raises(fp.InputError, match=r"^seed: (cannot change|found 5)"):
        fp.run({"seed": 5}, output=tmp_path / "r", local=True, resume=True)
    with pytest.raises(fp.InputError, match=r"^resume: "):
        fp.run(small, local=True, resume=True)


def test_a_callback_sees_every_round_and_stops_the_run(tmp_path, finished):
    seen = []

    def until_two(record):
        seen.append(record["round"])
        return record["round"] < 2

    stopped = fp.run(settings(*FEDAVG), output=tmp_path / "r", local=True, callbacks=[until_two])
    assert seen == [0, 1, 2]
    assert stopped.stopped
    assert stopped.result is None
    ended = fp.run(output=tmp_path / "r", local=True, resume=True)
    assert not ended.stopped
    assert without_times(ended.folder) == without_times(finished.folder)


def test_what_a_callback_raises_leaves_a_run_that_can_be_resumed(tmp_path, finished):
    def fail(record):
        if record["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fp.run(settings(*FEDAVG), output=tmp_path / "r", local=True, callbacks=[fail])
    ended = fp.run(output=tmp_path / "r", local=True, resume=True)
    assert without_times(ended.folder) == without_times(finished.folder)


def test_notes_go_to_the_logger(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fedprompt"):
        fp.run(settings(*FEDAVG, "federation.rounds=1"), output=tmp_path / "r", local=True)
    assert "loading the data" in caplog.text


def test_load_run_reads_a_folder_and_refuses_another(tmp_path, finished):
    loaded = fp.load_run(str(finished.folder))
    assert loaded.config == finished.config
    assert loaded.metrics.equals(finished.metrics)
    with pytest.raises(fp.InputError, match="no run in it"):
        fp.load_run(tmp_path)


def test_importing_fedprompt_changes_and_loads_nothing():
    code = (
        "import os, sys; before = dict(os.environ); import fedprompt\n"
        "assert dict(os.environ) == before\n"
        "heavy = {'torch', 'ray', 'pandas', 'numpy', 'ctypes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'run', 'load_run', 'sweep', 'InputError'} <= set(dir(fedprompt))\n"
        "import fedprompt.errors; assert fedprompt.InputError is fedprompt.errors.InputError\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    assert all(getattr(fp, name) is not None for name in fp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        fp.runn  # noqa: B018
