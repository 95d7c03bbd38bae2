"""The benchmark of personalization: its small version runs, repeats nothing that is done, and says what came out."""

import json

import pandas as pd
import pytest

from studies.profit import program as profit


@pytest.mark.long
def test_what_is_done_is_put_into_a_table_and_a_figure_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profit, "SEEDS", (0,))
    jobs = profit._jobs(profit.Path("runs/profit-quick"), quick=True)
    for job in jobs:
        profit._run(job)
    monkeypatch.setattr(profit, "_run", None)
    profit.main(tmp_path / "profit.json", quick=True)
    shown = capsys.readouterr().out
    assert "Adam clients, seed 0: start 0." in shown
    table = pd.read_csv(tmp_path / "profit.csv")
    assert set(table.optimizer) == {"Adam clients", "SGD clients"} == set(profit.CLIENTS)
    assert len(table) == 2 * 2 * 3 * (4 + 1)  # federations, rates, epochs, models
    rows = json.loads((tmp_path / "profit.json").read_text())["rows"]
    result = json.loads((jobs[0].folder / "personalize" / "result.json").read_text())["rates"][0]
    best = f"{100 * result['balanced']['personal_accuracy']:.1f} / {100 * result['balanced']['robust_accuracy']:.1f}"
    assert rows[0]["balance"] == best
    assert (tmp_path / "profit.png").read_bytes().startswith(b"\x89PNG")
