"""The command line: what it prints, and its exit codes."""

import os
import subprocess
import sys

import commands
import numpy as np
import pytest
import tiny
from PIL import Image

from fedprompt import __version__
from fedprompt.algorithms import registry
from fedprompt.runtime.folders.folders import mark
from fedprompt.tracking.partition_table import partition_lines

TINY = [*tiny.TINY, "data.limit=300", "federation.rounds=1"]


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Call the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        return commands.cli(*arguments), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["fedration.clients=3"], ["fedration", "did you mean 'federation'?"]),
        (["federation.client=3"], ["federation.client", "did you mean 'clients'?"]),
        (["algorithm.name=pftp"], ["algorithm.name", "'pftp'", "did you mean 'pfpt'?"]),
        (["algorithm.sweps=3"], ["algorithm.sweps", "did you mean 'sweeps'?"]),
        (["federation.rounds=many"], ["federation.rounds", "'many'", "whole number"]),
        (["partition.alpha=-1"], ["partition.alpha", "-1", "greater than 0"]),
        (["federation.cohort=7"], ["federation.cohort", "7", "1 to 6"]),
        (["prompt.top_k=7"], ["prompt.top_k", "7", "1 to 6"]),
        (["algorithm.max_pool=2"], ["algorithm.max_pool", "2", "prompt.top_k = 3"]),
        (["algorithm.name=head", "prompt.kind=pool"], ["prompt.kind", "'pool'", "none"]),
        (["federation.clients=5000"], ["clients", "5000"]),
        (["prompt.layer=50"], ["prompt.layer", "50", "0 to"]),
        (["backbone.image_size=33"], ["backbone.image_size", "33", "32 or 48"]),
        (["backbone.name=test_vti"], ["backbone.name", "test_vti"]),
        (["backbone.weights=missing.safetensors"], ["backbone.weights", "missing.safetensors"]),
        (["data.name=digit"], ["data.name", "'digit'", "did you mean 'digits'?"]),
        (["data.name=cifar10"], ["cifar10", "get it"]),
        (["data.root=nowhere"], ["data.root", "nowhere"]),
        (["data.limit=999999"], ["data.limit", "999999"]),
        (["runtime.storage=nosuch://here"], ["runtime.storage", "nosuch://here"]),
        (["rounds"], ["rounds"]),
        (["one.yaml", "two.yaml"], ["two.yaml", "one file"]),
        (["=5"], ["'=5'", "key.path=value"]),
        (["--rsume"], ["--rsume"]),
    ],
)
def test_bad_input_is_one_line_with_code_2_and_costs_no_run_that_lies_there(cli, tmp_path, arguments, named):
    output = tmp_path / "run"
    (output / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "result.json", "checkpoints/round_000009.pt"):
        (output / name).write_text("precious")
    mark(output, "run")
    code, _, errors = cli("run", *TINY, *arguments, "--output", output, "--overwrite", "--local")
    assert code == 2
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    for part in named:
        assert part in errors
    files = {str(path.relative_to(output)): path.read_text() for path in output.rglob("[!.]*") if path.is_file()}
    assert files == dict.fromkeys(
        ["config.yaml", "metrics.jsonl", "result.json", "checkpoints/round_000009.pt"], "precious"
    )


def test_bad_input_leaves_no_folder_behind(cli, tmp_path):
    assert cli("run", *TINY, "data.name=digit", "--output", tmp_path / "run", "--local")[0] == 2
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_without_a_flag_and_replaced_with_it(cli, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "result.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    mark(output, "run")
    code, _, errors = cli("run", *TINY, "--output", output, "--local")
    assert (code, errors.count("\n")) == (2, 1)
    assert "--resume, --overwrite" in errors
    assert (output / "result.json").read_text() == "{}"
    assert cli("run", *TINY, "--output", output, "--local", "--overwrite")[0] == 0
    assert '"algorithm": "pfpt"' in (output / "result.json").read_text()
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / ".replaced").exists()


def test_an_output_that_is_a_file_is_refused(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, errors = cli("run", *TINY, "--output", tmp_path / "file", "--local", "--overwrite")
    assert (code, errors.count("\n")) == (2, 1)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_writes_its_files_and_says_where(cli, tmp_path):
    (tmp_path / "my.yaml").write_text("seed: 5\n")
    code, output, errors = cli("run", "my.yaml", *TINY, "--local")
    assert (code, errors) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"written: runs/{folder.name}/" in output
    assert "pfpt on digits, 1 round, seed 5" in output
    assert {path.name for path in folder.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "result.json", "checkpoints", "partition.png", "accuracy.png"),
    }
    assert "seed: 5" in (folder / "config.yaml").read_text()


def test_the_written_configuration_gives_the_same_run_again(cli, tmp_path):
    cli("run", *TINY, "--local", "--output", tmp_path / "first")
    assert cli("run", tmp_path / "first" / "config.yaml", "--local", "--output", tmp_path / "second")[0] == 0
    first, second = ((tmp_path / name / "config.yaml").read_text() for name in ("first", "second"))
    assert first == second


def test_warnings_of_a_round_reach_the_terminal(cli, tmp_path):
    overrides = ["prompt.pool_size=4", "federation.rounds=2", "algorithm.sweeps=50", "algorithm.max_pool=3"]
    code, _, errors = cli("run", *TINY, *overrides, "--local", "--output", tmp_path / "run")
    assert code == 0
    assert errors.splitlines()[0] == (
        "fedprompt: round 1: the pool has shrunk to 3 prompts: every batch now takes all of them"
    )


def test_a_program_of_its_own_ends_with_the_code_and_one_line(tmp_path):
    command = [sys.executable, "-m", "fedprompt", "run", "federation.cohort=0", "--local"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "fedprompt: federation.cohort: found 0; allowed: greater than 0\n"
    assert list(tmp_path.iterdir()) == []


def test_lists_name_what_there_is_with_a_line_each(cli):
    methods = {line.split()[0]: line for line in cli("algorithms")[1].splitlines() if not line.startswith(" ")}
    assert methods.keys() == {method.name for method in registry.available()}
    assert all(len(line) < 120 for line in methods.values())
    data = cli("datasets")[1]
    assert "digits" in data
    assert "get it:" in data
    assert "vit_small_patch14_dinov2" in cli("backbones")[1]


def test_the_partition_is_shown_and_written(cli, tmp_path):
    code, output, _ = cli("partition", *TINY, "--features", "--output", tmp_path / "part")
    assert code == 0
    assert "client" in output
    assert 0 < float(output.split("feature_distance:")[1].split()[0]) < 1
    rows = (tmp_path / "part" / "partition.csv").read_text().splitlines()
    assert len(rows) == 1 + 6
    held_out = round(0.1 * 300)
    assert sum(int(count) for row in rows[1:] for count in row.split(",")[1:]) == 300 - held_out
    assert (tmp_path / "part" / "partition.png").exists()


@pytest.mark.parametrize("width", [10, 60, 120, 1000])
def test_the_partition_table_fits_the_terminal_and_says_what_it_leaves_out(width):
    counts = np.arange(600).reshape(3, 200)
    *rows, told = partition_lines(counts, [f"class {i}" for i in range(199)] + ["犬\n" * 9], width)
    shown = rows[0].count("class")
    assert 1 <= shown <= 40
    assert shown == 40 or width < 1000
    assert told.startswith(f"{200 - shown} of 200 classes are left out; --output")
    assert rows[2].split() == ["1", *map(str, range(200, 200 + shown)), str(counts[1].sum())]
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) <= max(width, 30)


def test_the_whole_partition_is_shown_where_it_fits():
    rows = partition_lines(np.eye(2, dtype=int), ["a\tb", "犬"], 120)
    assert [row.split() for row in rows] == [
        ["client", r"a\tb", "犬", "total"],
        ["0", "1", "0", "1"],
        ["1", "0", "1", "1"],
    ]


def test_partition_and_run_say_what_of_the_data_is_not_used(cli, tmp_path):
    photos = tmp_path / "photos"
    for part in ("train", "test"):
        for name in ("$x^_$", "$10"):
            (photos / part / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (640, 480), (i, 0, 0)).save(photos / part / name / f"{i}.png")
    (photos / "train" / "$10" / "more").mkdir()
    settings = ("data.name=folder", f"data.root={photos}", "federation.clients=2", "federation.cohort=1")
    settings = [*tiny.TINY_MODEL, *settings, "partition.min_size=1", "federation.rounds=1"]
    code, output, noted = cli("partition", *settings, "--output", tmp_path / "out")
    assert code == 0
    assert "$x^_$" in output
    code, _, told = cli("run", *settings, "--output", tmp_path / "run", "--local")
    assert code == 0
    for line in (noted, told):
        assert "not read: folders within class folders (1, such as train/$10/more)" in line
        assert "images of 640 x 480 pixels are reduced to 32 x 32 (backbone.image_size" in line
    for folder in ("out", "run"):
        assert (tmp_path / folder / "partition.png").exists()


def test_help_version_and_unknown_commands(cli):
    assert cli()[0] == 0
    assert "run" in cli()[1]
    assert __version__ in cli("--version")[1]
    code, _, errors = cli("rnu")
    assert (code, errors.count("\n")) == (2, 1)
    assert "rnu" in errors
    code, _, errors = cli("bench", "recovry")
    assert (code, errors.count("\n")) == (2, 1)
    assert "did you mean 'recovery'?" in errors
