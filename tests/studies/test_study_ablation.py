"""The ablations: their small version runs and tells; tables compare seed by seed."""

from pathlib import Path

import pandas as pd
import pytest

from fedprompt.config.parsing import load
from studies.ablations import program as ablations
from studies.ablations.tables import ablations as differences
from studies.ablations.tables import correlations, figure, sensitivities, tables, telling
from studies.comparison import program as comparison
from studies.many_runs import rows_of

ROOT = Path(__file__).parents[2]


def test_tables_of_the_page_are_made_of_the_committed_runs():
    page = (ROOT / "studies" / "ablations" / "README.md").read_text(encoding="utf-8").splitlines()
    for made in tables(pd.read_csv(ROOT / "studies/ablations/results/ablations.csv")).values():
        assert set(made.markdown().splitlines()) <= set(page)


def test_the_rates_are_those_that_the_committed_comparison_chose_for_pfpt_on_all_images():
    chosen = comparison.best_rates(rows_of(ROOT / "studies/comparison/results/comparison.csv"))
    assert chosen[comparison.ALL_IMAGES]["pfpt"] == ablations.RATES


def test_quick_ablations_run_and_resume(many_runs_here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ablations.main(tmp_path / "ablations.json", quick=True)
    table = pd.read_csv(tmp_path / "ablations.csv")
    ran = list(table[["setting", "method", "seed"]].itertuples(index=False, name=None))
    names = list(ablations.ABLATIONS)[:2]
    assert ran == [*(("alpha 0.1", name, 0) for name in names), ("alpha", "0.05", 0), ("alpha", "0.2", 0)]
    assert table.moved[0] > 0
    assert table.labels_apart[2] > table.labels_apart[3] > 0
    assert (table.features_apart[2:] > 0).all()
    assert (tmp_path / "ablations.png").stat().st_size > 10_000
    capsys.readouterr()
    ablations.main(None, quick=True)
    shown = capsys.readouterr().out
    for title, made in tables(table).items():
        assert f"## {title}\n\n{made.markdown()}" in shown


@pytest.mark.parametrize("quick", [False, True])
def test_every_planned_run_is_a_configuration(tmp_path, quick):
    stages = (ablations._ablations, ablations._telling, ablations._sensitivities)
    jobs = [job for stage in stages for job in stage(tmp_path, quick, {})]
    assert len({job.folder for job in jobs}) == len(jobs)
    plain = load(None, [*jobs[0].overrides, "seed=0"])
    for job in jobs[1:]:
        assert load(None, list(job.overrides)) != plain or job.method == ablations.BASE


def made_up(rows):
    scores = ("last10", "pool", "pools", "moved", "drift", "own_head", "labels_apart", "features_apart")
    columns = ("setting", "method", "seed", *scores)
    return pd.DataFrame([dict(zip(columns, row)) for row in rows])


def test_changes_are_compared_with_pfpt_seed_by_seed():
    table = made_up(
        [
            ("alpha 0.1", "pfpt", 0, 0.5, 30, "20 30", 0.1, 0.01, None, 0.8, 0.3),
            ("alpha 0.1", "pfpt", 1, 0.6, 32, "20 32", 0.1, 0.01, None, 0.8, 0.3),
            ("alpha 0.1", "other", 0, 0.6, 20, "20 20", 0.2, None, None, 0.8, 0.3),
            ("alpha 0.1", "other", 1, 0.8, 20, "20 20", 0.2, None, None, 0.8, 0.3),
            ("dominant", "pfpt", 0, 0.4, 20, "20 20", 0.1, 0.01, None, 0.9, 0.3),
            ("alpha", "5", 0, 0.7, 21, "20 21", 0.05, 0.02, None, 0.2, 0.3),
        ]
    )
    base, other = differences(table).rows
    assert base == ["pfpt", "55.0 ± 7.1", "–", "–", "–", "31", "10.0%", "1.0%"]
    assert other == ["other", "70.0 ± 14.1", "+15.0 ± 7.1", "0.205", "–", "20", "20.0%", "–"]  # t = 3, one degree
    assert telling(table).rows == [["pfpt", "55.0 ± 7.1", "40.0"]]
    assert sensitivities(table).rows == [
        ["alpha 0.1", "pfpt", "50.0", "30", "10.0%", "1.0%", "0.80", "0.30"],
        ["alpha", "5", "70.0", "21", "5.0%", "2.0%", "0.20", "0.30"],
    ]
    assert len(figure(table).axes) == 2


def test_what_predicts_the_pool_is_ranked_over_runs_that_differ_in_their_data():
    first = ("alpha 0.1", "pfpt", 0, 0.5, 36, "20 36", 0.12, 0.01, None, 0.8, 0.3)
    others = [
        ("alpha 0.1", "other", 0, 0.5, 99, "20 99", 0.9, 0.01, None, 0.8, 0.3),  # not the data
        ("alpha", "1", 0, 0.5, 30, "20 30", 0.13, 0.01, None, 0.5, 0.4),
        ("alpha", "5", 0, 0.5, 25, "20 25", 0.14, 0.01, None, 0.3, 0.2),
        ("data sets", "digits", 0, 0.5, 20, "20 20", 0.15, 0.01, None, 0.2, 0.1),
    ]
    assert [row[:3] for row in correlations(made_up([first, *others])).rows] == [
        ["labels apart", "+1.00", "4"],
        ["features apart", "+0.80", "4"],
        ["moved", "−1.00", "4"],
    ]
