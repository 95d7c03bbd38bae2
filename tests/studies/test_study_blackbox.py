"""The small version of the black-box benchmark: everybody takes part, and queries mean what the table says."""

import json

import pandas as pd
import pytest

from studies import many_runs
from studies.blackbox import program as blackbox


@pytest.mark.long
def test_quick_black_box_benchmark_tells_accuracy_over_queries_and_resumes(
    many_runs_here, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    blackbox.main(tmp_path / "blackbox.json", quick=True)
    table = pd.read_csv(tmp_path / "blackbox.csv")
    assert set(table.method) == set(blackbox.METHODS)
    assert len(table[table.stage == many_runs.SEARCH]) == 12
    table = table[table.stage != many_runs.SEARCH]
    assert table.groupby("method")["round"].apply(list).tolist() == [[0, 1, 2]] * 5
    assert table[table["round"] == 0].test.nunique() == 2  # local models are scored on a subsample
    last = table[table["round"] == 2].set_index("method").queries
    assert last["Fed-BBPT"] == last["local"] == 2 * last["white box"] > 0
    assert last["centralized"] == pytest.approx(last["Fed-BBPT"], rel=0.3)  # as many steps, but batches are fuller
    assert (tmp_path / "blackbox.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "blackbox.json").read_text())
    assert told["chosen"] == {
        method: list(trials[0]) for method, (_, trials) in blackbox.METHODS.items() if len(trials) > 1
    }
    rows = told["rows"]
    assert [row["method"] for row in rows] == [blackbox.ZERO_SHOT, *blackbox.METHODS]
    first = capsys.readouterr().out
    assert "white box" in first
    monkeypatch.setattr(many_runs, "_run", None)  # nothing is left to run
    blackbox.main(None, quick=True)
    assert first.splitlines()[-2] in capsys.readouterr().out
