"""The server step taken apart: what is measured of sets, and that the benchmark writes rows and a figure."""

import json

import pandas as pd
import pytest
import torch

from studies.mechanism import program as mechanism
from studies.mechanism.program import Sets, taken_apart


def test_quick_mechanism_takes_rounds_apart_and_scales_the_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mechanism.main(tmp_path / "mechanism.json", quick=True)
    table = pd.read_csv(tmp_path / "mechanism.csv")
    assert table.what.tolist() == ["sweeps"] * 4 + ["scale", "copies"] * 2
    assert table["round"].tolist() == [1, 1, 2, 2, *[2] * 4]
    assert (table[table.what == "sweeps"].moved > 0).all()
    copies = table[table.what == "copies"]
    assert (copies[["moved", "between"]] < 1e-6).all(axis=None)
    assert (copies.length / copies.scale).tolist() == pytest.approx([table.length[2]] * 2, rel=1e-5)
    assert "algorithm.name=pfpt" in json.loads((tmp_path / "mechanism.json").read_text())["run"]
    assert (tmp_path / "mechanism.png").stat().st_size > 10_000
    assert "copies:" in capsys.readouterr().out


def test_lengths_are_relative_to_those_of_the_prompts_that_were_sent():
    sent = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    off = torch.tensor([0.0, 0.0, 0.6, 0.0])
    (row,) = taken_apart(Sets(7, sent, torch.stack([sent - off, sent + off])), (3,))
    assert (row["round"], row["sweeps"], row["length"]) == (7, 3, pytest.approx(1.5))
    assert row["moved"] == row["between"] == pytest.approx(0.2)
    assert row["apart"] == pytest.approx(2**0.5)
    assert 3 <= row["prompts"] <= 6


def test_more_sweeps_go_on_where_fewer_end():
    sent = 0.05 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    sets = Sets(1, sent, sent + 0.01 * torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1)))
    rows = taken_apart(sets, (1, 5, 300))
    assert rows[0]["sigma"] > rows[1]["sigma"] > rows[2]["sigma"]  # it starts at a half, far above what there is
    assert [row["between"] for row in rows] == [rows[0]["between"]] * 3
