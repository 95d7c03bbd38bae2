"""The benchmarks of local training: both ways do the same work, the counts are right, the small versions run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import training
from fedprompt.cli import main
from fedprompt.programs import BENCHMARKS, PROGRAMS, STUDIES, program
from studies.layers import program as layers


@pytest.mark.parametrize("found", ["a folder", "below a file"])
def test_results_that_could_not_be_written_are_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, found
):
    (tmp_path / "file").write_text("kept")
    path = tmp_path if found == "a folder" else tmp_path / "file" / "training.json"
    monkeypatch.setattr(sys, "argv", ["training", "--json", str(path)])
    with pytest.raises(SystemExit) as end:
        program(lambda *_, **__: pytest.fail("it measures"))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"fedprompt: --json: {tmp_path}")
    assert (tmp_path / "file").read_text() == "kept"


def test_results_get_a_folder_and_leave_nothing_where_measuring_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training", "--json", str(tmp_path / "new" / "training.json")])
    with pytest.raises(SystemExit) as end:
        program(lambda path, quick: path.stat())
    assert end.value.code == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


def test_help_and_a_mistyped_name_tell_which_benchmarks_there_are():
    told = CliRunner().invoke(main, ["bench", "-h"]).output
    assert all(f"\n    {name:<15}{about}\n" in told for name, about in {**STUDIES, **BENCHMARKS}.items())
    answer = CliRunner().invoke(main, ["bench", "aggregation"])
    assert answer.exit_code == 0
    assert answer.stdout == "python -m benchmarks.aggregation\n"
    end = CliRunner().invoke(main, ["bench", "agregation"])
    assert end.exit_code == 2
    assert "'agregation' (did you mean 'aggregation'?); allowed: ablations, " in end.output


def test_every_program_of_the_folders_is_listed_and_says_what_it_does():
    studies = {path.parent.name for path in Path("studies").glob("*/__main__.py")}
    timings = {path.stem for path in Path("benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert (studies, timings) == (set(STUDIES), set(BENCHMARKS))
    for name in ("comparison", "aggregation"):
        command = [sys.executable, *PROGRAMS[name].split()[1:], "--help"]
        assert "--quick" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def group():
    return training.Group(20, "backbone.image_size=32", "prompt.layer=0", "local.batch_size=8", *training.QUICK)


def test_obvious_way_trains_on_the_same_losses_as_the_fused_one(group):
    fused = [update.loss for update in group.train()]
    # the obvious way rounds resized pixels to whole numbers, as PIL does
    np.testing.assert_allclose(training.Obvious(group).train(), fused, rtol=2e-3)


def test_needed_operations_are_those_of_the_blocks_matrix_products(group):
    backbone, prompts, images = group.model.backbone, 3, 2
    width, tokens, mlp = backbone.width, backbone.tokens_per_sample + prompts, backbone.vit.blocks[0].mlp
    one_token = 2 * width * (4 * width + 2 * mlp.fc1.out_features)  # qkv, proj and the MLP
    upper = images * backbone.depth * (2 * tokens * one_token + 12 * tokens**2 * width)
    counted = training.needed_operations(group.model, images, prompts)
    assert (backbone.depth - 1.5) / backbone.depth * upper < counted < upper
    assert training.needed_operations(group.model, 10, prompts) == pytest.approx(5 * counted)


def test_quick_training_benchmark_tells_ratios_and_shares(tmp_path, capsys):
    training.main(tmp_path / "training.json", quick=True)
    (row,) = json.loads((tmp_path / "training.json").read_text())["sizes"]
    assert row["speed_ratio"] > 0
    assert all(0 < share < 2 for share in row["share"].values())
    assert row["mean_loss"][training.FUSED] == pytest.approx(row["mean_loss"][training.OBVIOUS], rel=1e-2)
    assert "times as fast as the obvious way" in capsys.readouterr().out


@pytest.mark.long
def test_quick_layers_benchmark_writes_curves_and_a_figure(tmp_path, capsys):
    layers.main(tmp_path / "layers.json", quick=True)
    rows = json.loads((tmp_path / "layers.json").read_text())["layers"]
    assert [row["layer"] for row in rows] == list(layers.QUICK_LAYERS)
    for row in rows:
        assert row["step_seconds"] > 0
        (curve,) = row["curves"]
        assert curve[0]["seconds"] == 0 < curve[-1]["seconds"]
        assert 0 <= row["test"] <= 1
        assert [point["round"] for point in curve] == list(range(len(curve)))
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "layer  2" in capsys.readouterr().out


def test_accuracy_at_a_time_is_that_of_the_last_evaluation_before_it():
    curve = [{"seconds": s, "test": a} for s, a in ((0.0, 0.1), (2.0, 0.5), (4.0, 0.7))]
    np.testing.assert_array_equal(
        layers.at(curve, "test", np.array([0, 1.9, 2.0, 3.0, 9.0])), [0.1, 0.1, 0.5, 0.5, 0.7]
    )
