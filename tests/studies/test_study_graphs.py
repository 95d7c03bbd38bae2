"""The benchmark of graphs: its small version runs, and what is done is not run again."""

import json

import pandas as pd
import pytest

from studies.graphs import program as graphs
from studies.many_runs import SEARCH


@pytest.mark.long
def test_quick_graphs_benchmark_writes_rows_and_a_figure_and_resumes(many_runs_here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "graphs.json"
    graphs.main(target, quick=True)
    table = pd.read_csv(tmp_path / "graphs.csv")
    assert table[table.stage == SEARCH].rates.nunique() == 1
    table = table[table.stage != SEARCH]
    assert [(row.graph, row.method) for row in table.itertuples()] == [
        ("ring", "dfedavg"),
        ("ring", "dfedsam-mgs"),
        ("full", "dfedavg"),
        ("full", "dfedsam-mgs"),
    ]
    by_run = table.set_index(["graph", "method"])
    assert by_run.bytes_sent["ring", "dfedsam-mgs"] == 4 * by_run.bytes_sent["ring", "dfedavg"]
    assert by_run.consensus_distance["ring", "dfedavg"] > by_run.consensus_distance["ring", "dfedsam-mgs"]
    assert (tmp_path / "graphs.png").read_bytes().startswith(b"\x89PNG")
    assert {row["graph"] for row in json.loads(target.read_text())["rows"]} == {"ring", "full"}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/result.json")}
    assert len(written) == 6
    graphs.main(target, quick=True)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "consensus" in capsys.readouterr().out.splitlines()[-6]
