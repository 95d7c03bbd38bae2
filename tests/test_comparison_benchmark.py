"""The comparison of all methods: its small version searches, runs, tells differences over seeds, and resumes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedprompt.benchmarks import comparison
from fedprompt.benchmarks.comparison_tables import HARDEST_FIRST, accuracies, against_best_baseline, tables
from fedprompt.benchmarks.contestants import DATA, SETTINGS, SKEW
from fedprompt.benchmarks.many_runs import SEARCH, Job, Kept

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder in which a quick comparison was run."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        comparison.main(folder / "comparison.json", quick=True)
    return folder


def test_quick_comparison_searches_and_runs_and_resumes(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    table = pd.read_csv(finished / "comparison.csv")
    by_stage = table.groupby("stage").size()
    assert by_stage.to_dict() == {SEARCH: 4, "headline": 4, "once": 2, "untuned": 4}
    told = json.loads((finished / "comparison.json").read_text())
    for method, rates in told["chosen"].items():
        trials = table[(table.stage == SEARCH) & (table.method == method)]
        best = trials[trials.validation == trials.validation.max()]
        assert rates == min(of_trial.split() for of_trial in best.rates)
        assert set(table[(table.stage == "headline") & (table.method == method)].rates) == {" ".join(rates)}
    curves = pd.read_csv(finished / "comparison.curves.csv")
    assert curves.groupby(["setting", "method"])["round"].agg(list).tolist() == [[0, 1, 2]] * 4
    runs = {path: path.stat().st_mtime_ns for path in finished.glob("runs/**/result.json")}
    assert len(runs) == 14
    capsys.readouterr()
    comparison.main(None, quick=True)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    shown = capsys.readouterr().out
    assert f"| method | {' | '.join(list(SETTINGS)[:2])} |" in shown
    for title, made in tables(table).items():
        assert f"## {title}\n\n{made.markdown()}" in shown


def test_a_run_with_a_row_is_not_repeated_where_its_folder_is_missing(finished, many_runs_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = (finished / "comparison.csv").read_text().splitlines()
    one = "headline,dominant,fedavg,0,"
    (tmp_path / "comparison.csv").write_text("\n".join(row for row in before if not row.startswith(one)) + "\n")
    shutil.copy(finished / "comparison.curves.csv", tmp_path)
    comparison.main(tmp_path / "comparison.json", quick=True)
    (result,) = tmp_path.glob("runs/**/result.json")
    assert result.parent.name.startswith("headline-dominant-fedavg-seed0-")
    columns = before[0].split(",").index("seconds_per_round")
    rows = (tmp_path / "comparison.csv").read_text().splitlines()
    assert [row.split(",")[:columns] for row in rows] == [row.split(",")[:columns] for row in before]
    for name in ("comparison.json", "comparison.curves.csv"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_rates_chosen_anew_are_not_taken_for_the_kept_ones():
    kept = Kept({"stage": "headline", "setting": "s", "method": "m", "seed": 0, "rates": "local.lr=0.1 local.epochs=2"})
    job = Job(Path("runs"), "headline", "s", "m", 0, ("local.lr=0.1", "local.epochs=2"), ())
    assert kept.is_of(job)
    assert not kept.is_of(replace(job, rates=("local.lr=0.2", "local.epochs=2")))
    assert job.folder != replace(job, rates=("local.lr=0.2",)).folder


def made_up(**scores):
    """Headline runs of one setting: of every method its mean on validation data, and test scores by seed."""
    rows = [
        {"stage": "headline", "setting": "s", "method": method, "seed": seed, "validation": valid, "last10": test}
        for method, (valid, tests) in scores.items()
        for seed, test in enumerate(tests)
    ]
    return pd.DataFrame(rows)


def test_pfpt_is_compared_with_the_baseline_that_validation_prefers_seed_by_seed():
    table = made_up(pfpt=(0.5, (0.60, 0.70)), test_best=(0.1, (0.9, 0.9)), validation_best=(0.4, (0.5, 0.4)))
    (row,) = against_best_baseline(table).rows
    assert row == ["s", "pfpt", "validation_best", "+20.0 ± 14.1", "2", "0.295"]  # t = 2 with one degree of freedom
    (row,) = against_best_baseline(made_up(pfpt=(0.5, (0.4, 0.3)), other=(0.4, (0.5, 0.6)))).rows
    assert row[3] == "−20.0 ± 14.1"


def test_what_is_not_published_is_no_baseline_but_compared_with_one():
    table = made_up(**{"pfpt": (0.5, (0.6, 0.7)), "pfpt-mem": (0.9, (1.0, 0.9)), "other": (0.4, (0.5, 0.55))})
    rows = against_best_baseline(table).rows
    assert [row[1:4] for row in rows] == [["pfpt", "other", "+12.5 ± 3.5"], ["pfpt-mem", "other", "+42.5 ± 10.6"]]


def test_the_best_mean_of_a_setting_is_on_top_and_bold():
    made = accuracies(made_up(worse=(0.5, (0.60, 0.70)), better=(0.1, (0.9, 0.7))))
    assert made.rows == [["better", "80.0 ± 14.1"], ["worse", "65.0 ± 7.1"]]
    assert made.bold == {(0, 1)}


def test_the_figure_shows_every_kind_of_skew():
    assert set(HARDEST_FIRST) == set(SKEW)


def test_tables_of_the_pages_are_made_of_the_committed_runs():
    made = list(tables(pd.read_csv(ROOT / "docs" / "results" / "comparison.csv")).values())
    for page, shown in (("docs/comparison.md", made), ("README.md", made[:1])):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        assert {line for table in shown for line in table.markdown().splitlines()} <= set(lines)


def test_every_data_set_meets_every_skew():
    assert len(SETTINGS) == len(DATA) * len(SKEW)
    assert SETTINGS["two domains, alpha 0.5"] == (*DATA["two domains"], *SKEW["alpha 0.5"])
