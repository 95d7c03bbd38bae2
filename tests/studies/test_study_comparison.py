"""The comparison of all methods: its small version searches, runs, tells differences over seeds, and resumes."""

import json
import shutil
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.reports.tables import MISSING
from studies import many_runs
from studies.comparison import program as comparison
from studies.comparison.contestants import (
    APART,
    BEHIND,
    CAPPED,
    DATA,
    FEW_IMAGES,
    FIRST,
    HEADLINE,
    SETTINGS,
    SKEW,
    setting_of,
    twice,
)
from studies.comparison.tables import HARDEST_FIRST, accuracies, against_best_baseline, tables
from studies.many_runs import FAILED, SEARCH, Job, Kept, rows_of

ROOT = Path(__file__).parents[2]


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
    for method, rates in told["chosen"]["Fashion-MNIST"].items():
        trials = table[(table.stage == SEARCH) & (table.method == method)]
        best = trials[trials.validation == trials.validation.max()]
        assert rates == min(best.rates)
        assert set(table[(table.stage == "headline") & (table.method == method)].rates) == {rates}
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


def trial(setting, method, rates, validation):
    row = {"stage": SEARCH, "setting": setting, "method": method, "seed": 100, "rates": rates, "validation": validation}
    return Kept(row)


def test_every_data_set_has_rates_of_its_own_where_it_was_searched():
    done = [
        trial("alpha 0.1", "fedavg", "local.lr=1", 0.4),
        trial("alpha 0.1", "full, fedavg", "local.lr=5", 0.4),
        trial("long tail, alpha 0.1", "fedavg", "local.lr=2", 0.2),
        trial("long tail, alpha 0.1", "fedavg", "local.lr=3", 0.3),
        trial("long tail, alpha 0.1", "fedavg", "local.lr=4", float("nan")),
    ]
    rates = comparison.best_rates(done)
    assert rates["Fashion-MNIST"] == {"fedavg": ("local.lr=1",), "full, fedavg": ("local.lr=5",)}
    assert rates["long tail"] == {"fedavg": ("local.lr=3",), "full, fedavg": ("local.lr=5",)}


def test_where_images_are_few_clients_learn_at_twice_the_rates_and_servers_do_not():
    assert twice(("local.lr=0.0005", "algorithm.server_lr=0.05")) == (
        *("local.lr=0.001", "local.prompt_lr=0.002", "algorithm.server_lr=0.05"),
    )


def test_every_method_has_as_many_trials_and_on_few_images_what_was_chosen_before_as_one_more(tmp_path):
    kept = rows_of(ROOT / "studies/comparison/results/comparison.csv")
    first, again = comparison._search(tmp_path, False, kept), comparison._search_again(tmp_path, False, kept)
    assert {sum(job.method == method for job in first) for method in HEADLINE} == {6}
    by_setting = Counter((job.setting, job.method) for job in again)
    assert set(by_setting.values()) == {7}
    assert len(by_setting) == len(FEW_IMAGES) * len(HEADLINE)
    chosen = comparison.best_rates(kept)["Fashion-MNIST"]
    assert {(setting, method, chosen[method]) for setting, method in by_setting} <= {
        (job.setting, job.method, job.rates) for job in again
    }


def test_what_is_taken_apart_differs_from_its_kin_by_how_it_aggregates_and_what_on_alone(tmp_path):
    kept = rows_of(ROOT / "studies/comparison/results/comparison.csv")
    kin = {job.method: job for job in comparison._headline(tmp_path, False, kept) if job.setting == setting_of(*BEHIND)}
    jobs = comparison._apart(tmp_path, False, kept)
    assert {job.method for job in jobs} == set(APART)
    for job in jobs:
        ours, theirs = (load(None, list(of.overrides)) for of in (job, kin[APART[job.method][1]]))
        same = theirs.model_copy(update={"algorithm": ours.algorithm, "seed": ours.seed, "prompt": ours.prompt})
        assert ours == same, job.method


def test_the_studys_federation_differs_from_the_first_setting_in_clients_rounds_and_epochs_alone(tmp_path):
    kept = rows_of(ROOT / "studies/comparison/results/comparison.csv")
    here = {(job.method, job.seed): job for job in comparison._headline(tmp_path, False, kept) if job.setting == FIRST}
    jobs = comparison._study(tmp_path, False, kept)
    assert len(jobs) == 18
    for job in jobs:
        kin = CAPPED[job.method][1] if job.method in CAPPED else job.method
        ours, theirs = (load(None, list(of.overrides)) for of in (job, here[kin, job.seed]))
        if job.method in CAPPED:
            assert (ours.algorithm.max_pool, theirs.algorithm.max_pool) == (20, None)
            theirs = theirs.model_copy(update={"algorithm": theirs.algorithm.model_copy(update={"max_pool": 20})})
        told = (ours.federation.clients, ours.federation.cohort, ours.federation.rounds, ours.local.epochs)
        assert (*told, ours.local.batch_size) == (100, 10, 120, 5, 16)
        shape = {"clients": 100, "cohort": 10, "rounds": 120, "eval_every": 4}
        federation, local = theirs.federation.model_copy(update=shape), theirs.local.model_copy(update={"epochs": 5})
        assert ours == theirs.model_copy(update={"federation": federation, "local": local}), job.method


def test_a_run_at_rates_that_are_chosen_no_more_gives_way_to_the_new_one():
    runs = [
        trial("s", "fedavg", "local.lr=1", 0.4),
        trial("s", "fedavg", "local.lr=2", 0.5),
        Kept({"stage": "headline", "setting": "s", "method": "fedavg", "seed": 0, "rates": "local.lr=1"}),
        Kept({"stage": "headline", "setting": "s", "method": "fedavg", "seed": 0, "rates": "local.lr=2"}),
    ]
    table = comparison.table(runs)
    assert table[["stage", "rates"]].agg(" ".join, axis=1).tolist() == [
        *(f"{SEARCH} local.lr=1", f"{SEARCH} local.lr=2", "headline local.lr=2")
    ]


def test_a_run_that_diverged_has_a_row_and_is_neither_chosen_nor_repeated(tmp_path):
    job = Job(tmp_path, SEARCH, "alpha 0.1", "fedavg", 100, ("local.lr=9",), ())
    job.folder.mkdir()
    (job.folder / FAILED).write_text("nan")
    comparison.table([job, trial("alpha 0.1", "fedavg", "local.lr=1", 0.1)]).to_csv(tmp_path / "runs.csv", index=False)
    kept = rows_of(tmp_path / "runs.csv")
    assert [run.failed for run in kept] == [False, True]
    assert kept[1].is_of(job)
    assert comparison.best_rates(kept)["Fashion-MNIST"] == {"fedavg": ("local.lr=1",)}


def test_a_run_of_other_settings_in_the_same_folder_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(many_runs, "one_per_core", nullcontext)
    job = Job(tmp_path, "once", "alpha 0.1", "fedavg", 0, (), ("algorithm.name=fedavg", "federation.rounds=2"))
    job.folder.mkdir()
    (job.folder / "config.yaml").write_text(load(None, ["algorithm.name=fedavg", "federation.rounds=3"]).to_yaml())
    (job.folder / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"^federation\.rounds: found 2, but .* has 3; allowed: another --output"):
        many_runs.run_stages(tmp_path / "runs.csv", comparison.table, lambda done: [job])


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


def test_methods_are_in_the_order_of_the_settings_that_all_have():
    hard = made_up(everywhere=(0.5, (0.3, 0.3)), once=(0.5, (0.4, 0.4)))
    easy = made_up(everywhere=(0.5, (0.9, 0.9))).assign(setting="easy")
    made = accuracies(pd.concat([hard, easy]))
    assert made.rows == [["once", "40.0 ± 0.0", MISSING], ["everywhere", "30.0 ± 0.0", "90.0 ± 0.0"]]
    assert made.bold == {(0, 1), (1, 2)}


def test_the_figure_shows_every_kind_of_skew():
    assert set(HARDEST_FIRST) == set(SKEW)


def test_tables_of_the_pages_are_made_of_the_committed_runs():
    made = list(tables(pd.read_csv(ROOT / "studies/comparison/results/comparison.csv")).values())
    for page, shown in (("studies/comparison/README.md", made), ("README.md", made[:1])):
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        assert {line for table in shown for line in table.markdown().splitlines()} <= set(lines)


def test_every_data_set_meets_every_skew():
    assert len(SETTINGS) == len(DATA) * len(SKEW)
    assert SETTINGS["two domains, alpha 0.5"] == (*DATA["two domains"], *SKEW["alpha 0.5"])
