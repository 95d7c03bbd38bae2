"""The search of prompts: its small version searches one thing on top of the other, compares, and resumes."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedprompt.config.parsing import load
from studies.many_runs import SEARCH
from studies.prompts import program as prompts
from studies.prompts.tables import compared, figure, searched, tables

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_quick_search_goes_on_from_the_best_and_resumes(many_runs_here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompts.main(tmp_path / "prompts.json", quick=True)
    table = pd.read_csv(tmp_path / "prompts.csv")
    trials = table[(table.stage == SEARCH) & (table.length > 0) & (table.block == 2)]  # the default of its backbone
    first = trials.sort_values(["validation", "method"], ascending=[False, True]).iloc[0]
    found = json.loads((tmp_path / "prompts.json").read_text())
    assert found["prompts"] == {name: first[name] for name in ("init", "block", "length", "size")}
    assert found["rates"] == first.rates.split()
    assert {"none, 32 px", "10 uniform, block 2, 32 px", first.method} == set(table[table.stage == "compared"].method)
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/result.json")}
    assert len(runs) == len(table)
    capsys.readouterr()
    prompts.main(None, quick=True)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    shown = capsys.readouterr().out
    for title, made in tables(table).items():
        assert f"## {title}\n\n{made.markdown()}" in shown
    assert (tmp_path / "prompts.png").stat().st_size > 10_000


def test_tables_of_the_page_are_made_of_the_committed_runs():
    page = (ROOT / "studies" / "prompts" / "README.md").read_text(encoding="utf-8").splitlines()
    for made in tables(pd.read_csv(ROOT / "studies/prompts/results/prompts.csv")).values():
        assert set(made.markdown().splitlines()) <= set(page)


def test_all_prompts_that_are_searched_are_configurations(tmp_path):
    jobs = prompts._without(tmp_path, False, [])
    assert {job.seed for job in jobs} == {100}
    for name, values in prompts.VARIED.items():
        for value in values:
            own = replace(prompts.Prompts(), **{name: value})
            config = load(None, ["algorithm.name=fedavg", *own.overrides])
            assert (config.prompt.init, config.prompt.layer) == (own.init, own.block)
            assert (config.prompt.length, config.backbone.image_size) == (own.length, own.size)
    none = load(None, ["algorithm.name=fedavg", *prompts.Prompts(length=0, size=56).overrides])
    assert (none.prompt.kind, none.backbone.image_size) == ("none", 56)


def row(stage, setting, method, init, block, length, size, seed, rates, validation, last10):
    names = "stage setting method init block length size seed rates validation last10 seconds_per_round"
    values = (stage, setting, method, init, block, length, size, seed, rates, validation, last10, 2.0)
    return dict(zip(names.split(), values))


def test_prompts_are_told_by_their_best_rate_and_against_none_of_their_size():
    none, ten = ("none, 42 px", "uniform", 10, 0, 42), ("10 uniform", "uniform", 10, 10, 42)
    table = pd.DataFrame(
        [
            row(SEARCH, "fedmem", *none, 100, "a", 0.5, 0.0),
            row(SEARCH, "fedmem", *ten, 100, "b", 0.4, 0.0),
            row(SEARCH, "fedmem", *ten, 100, "c", 0.6, 0.0),
            row(SEARCH, "fedmem", "5 uniform", "uniform", 10, 5, 42, 100, "c", 0.55, 0.0),
            *(row("compared", "fedmem", *none, seed, "a", 0.0, test) for seed, test in enumerate((0.5, 0.6))),
            *(row("compared", "fedmem", *ten, seed, "c", 0.0, test) for seed, test in enumerate((0.6, 0.8))),
            row("compared", "fedmem", "big", "uniform", 10, 10, 84, 0, "c", 0.0, 0.9),
        ]
    )
    assert [row[:3] for row in searched(table[table.stage == SEARCH]).rows] == [
        ["10 uniform", "c", "60.0"],
        ["5 uniform", "c", "55.0"],
        ["none, 42 px", "a", "50.0"],
    ]
    assert compared(table[table.stage == "compared"][:4]).rows == [
        ["none, 42 px", "55.0 ± 7.1", "–", "–", "–"],
        ["10 uniform", "70.0 ± 14.1", "+15.0 ± 7.1", "2", "0.205"],
    ]
    assert len(figure(table).axes) == 4
