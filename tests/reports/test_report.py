"""The report: what counts as one experiment, its numbers, its tests, and what it says of runs that do not count."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml
from PIL import Image
from scipy import stats

from fedprompt.cli import main
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.reports import figures, groups
from fedprompt.reports.groups import make_groups
from fedprompt.reports.report import write_report
from fedprompt.reports.statistics import compare, holm, smallest_wilcoxon_p
from fedprompt.reports.tables import COLUMNS, Table, comparison_table, latex, setting_table
from fedprompt.reports.verdict import verdict
from fedprompt.runtime.run import new_run, run_in_process
from fedprompt.tracking.plots import pixels
from fedprompt.tracking.runs import Run, find

SAME_RATES = ("local.lr=1e-3", "local.prompt_lr=1e-3")


def make_run(folder, *overrides, accuracy=0.5, validation=None, **changes):
    """A finished run without running it: three rounds, the given accuracy in all of them."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load(None, [*overrides, "federation.rounds=3"]).to_yaml())
    validation = accuracy if validation is None else validation
    scores = {"accuracy": accuracy, "validation_accuracy": validation, "round": 3}
    result = {
        "rounds": 3,
        **{"final": scores, "best": scores},
        "last10": {**scores, "client_mean_accuracy": 0.4, "evaluations": 3},
        "clients": {"mean_accuracy": 0.4, "worst_decile_accuracy": None, "accuracies": [0.2, None, 0.6]},
        "communication": {"up_bytes": 2_000_000, "down_bytes": 4_000_000, "full_model_bytes": 60_000_000},
        "seconds": {"total": 6.0},
        "versions": {"fedprompt": "0.1.0"},
    }
    (folder / "result.json").write_text(json.dumps({**result, **changes}))
    lines = [{"round": round, "test": {"accuracy": accuracy}} for round in range(4)]
    sent = {"communication": {"up_bytes": 700, "down_bytes": 300}, "aggregate": {"pool_size": 6.0}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**line, **sent}) + "\n" for line in lines))
    return folder


def make_methods(folder, accuracies, *overrides):
    """A run per method and seed, all at the same rates: {method: accuracy per seed}, of validation and test alike."""
    for method, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            keys = (f"algorithm.name={method}", f"seed={seed}", *SAME_RATES, *overrides)
            make_run(folder / f"{method}-{seed}", *keys, accuracy=accuracy)
    return folder


def groups_of(*folders):
    return make_groups(find(folders)[0])[0]


def names(groups):
    return [(group.setting, group.method, group.seeds) for group in groups]


# --- runs


def test_a_folder_without_a_run_and_one_that_is_none_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no run in it or below"):
        find([tmp_path])
    with pytest.raises(InputError, match="nowhere: not a folder"):
        find([tmp_path / "nowhere"])


def test_runs_are_found_at_every_depth_once_and_not_in_what_a_run_has_laid_aside(tmp_path):
    make_run(tmp_path / "000-first")
    make_run(tmp_path / "sweep" / "001-second", "seed=1")
    make_run(tmp_path / "000-first" / ".replaced", "seed=2")
    (tmp_path / "sweep" / "config.yaml").write_text("not: a run's\n")
    runs, left_out = find([tmp_path, tmp_path / "sweep"])
    assert ([run.folder.name for run in runs], left_out) == (["000-first", "001-second"], [])


def test_what_has_not_ended_or_cannot_be_read_is_named_with_the_reason(tmp_path):
    make_run(tmp_path / "done")
    stopped = make_run(tmp_path / "stopped")
    (stopped / "result.json").unlink()
    (stopped / "error.txt").write_text("Traceback\nMemoryError: out of memory\n")
    (make_run(tmp_path / "torn") / "result.json").write_text('{"final": ')
    make_run(tmp_path / "empty", last10={})
    (make_run(tmp_path / "lost") / "metrics.jsonl").unlink()
    runs, left_out = find([tmp_path])
    assert [run.folder.name for run in runs] == ["done"]
    why = {item.folder.name: item.why for item in left_out}
    assert why.keys() == {"stopped", "torn", "empty", "lost"}
    assert why["stopped"].endswith("round 3 of 3; MemoryError: out of memory")
    assert "cannot be read" in why["torn"]
    assert why["empty"] == "result.json: has no last10.accuracy"
    assert "metrics.jsonl: not found" in why["lost"]


HUGE = "[" * 100_000  # deeper than Python's recursion


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("result.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": null'), "accuracy: found None"),
        ("result.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": "0.5"'), "accuracy: found '0.5'"),
        ("result.json", lambda text: text.replace('"accuracy": 0.5', '"accuracy": NaN'), "accuracy: found nan"),
        ("result.json", lambda text: text.replace('"rounds": 3', '"rounds": 0'), "rounds: found 0"),
        ("result.json", lambda text: text.replace('"rounds": 3', '"rounds": true'), "rounds: found True"),
        ("result.json", lambda text: text.replace('"total": 6.0', '"total": null'), "seconds.total: found None"),
        ("result.json", lambda text: text.replace("2000000", '"many"'), "communication.up_bytes: found 'many'"),
        ("result.json", lambda text: text.replace("[0.2, null", "[[], null"), "clients.accuracies.0: found []"),
        ("result.json", lambda text: "[]", "the whole: found []"),
        ("result.json", lambda text: "null", "the whole: found None; allowed: an object with keys"),
        ("metrics.jsonl", lambda text: text[:-9], "metrics.jsonl: ends with round 2, and result.json is of 3"),
        ("result.json", lambda text: HUGE, "result.json: cannot be read"),
        ("result.json", lambda text: text[:40], "result.json: cannot be read"),
        ("metrics.jsonl", lambda text: text.replace('"accuracy": 0.5', '"accuracy": "high"'), "round 0: test.accuracy"),
        ("metrics.jsonl", lambda text: text.replace('{"accuracy": 0.5}', "5"), "round 0: test: found 5"),
        ("metrics.jsonl", lambda text: text.replace("6.0", "[]"), "round 0: aggregate.pool_size: found []"),
        ("metrics.jsonl", lambda text: text.replace("700", "null"), "communication.up_bytes: found None"),
        (
            "metrics.jsonl",
            lambda text: text.replace('"accuracy": 0.5', '"accuracy": null'),
            "no round has a test accuracy",
        ),
    ],
)
def test_a_damaged_run_is_left_out_with_the_key_and_does_not_end_the_report(tmp_path, name, damage, why):
    make_methods(tmp_path / "whole", {"fedavg": [0.5, 0.6], "pfpt": [0.4, 0.5]})
    damaged = make_run(tmp_path / "damaged") / name
    damaged.write_text(damage(damaged.read_text()))
    count, left_out = write_report([tmp_path], tmp_path / "report")
    assert (count, [item.folder.name for item in left_out]) == (4, ["damaged"])
    assert why in left_out[0].why
    assert left_out[0].why.startswith(name)
    assert left_out[0].why.isprintable()


def test_rounds_without_a_number_are_no_points_of_a_curve(tmp_path):
    for seed in (0, 1):
        metrics = make_run(tmp_path / str(seed), f"seed={seed}") / "metrics.jsonl"
        first, second, *rest = metrics.read_text().splitlines()
        without = second.replace('"accuracy": 0.5', '"accuracy": null').replace("6.0", "null")
        metrics.write_text("\n".join([first, without, *rest]) + "\n")
    (group,) = groups_of(tmp_path)
    rounds, accuracy = figures._curve(group, figures._rounds)
    assert (rounds.tolist(), accuracy.tolist()) == ([2, 3], [[50, 50], [50, 50]])
    write_report([tmp_path], tmp_path / "report")


def test_pools_that_cannot_be_read_are_no_part_of_the_map(tmp_path):
    run = Run(tmp_path, {}, {}, [])
    (tmp_path / "pools").mkdir()
    draw = np.random.default_rng(0)
    for round in range(4):
        np.save(tmp_path / "pools" / f"round_{round:06d}.npy", draw.normal(size=(5, 3)))
    whole = figures.load_pools(run)
    assert whole.keys() == {0, 1, 2, 3}
    np.save(tmp_path / "pools" / "round_000004.npy", draw.normal(size=(5, 2)))  # of another width
    np.save(tmp_path / "pools" / "round_000005.npy", draw.normal(size=5))
    np.save(tmp_path / "pools" / "round_000006.npy", np.array([["text"]]))
    (tmp_path / "pools" / "round_000007.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "pools" / "round_last.npy").write_bytes(b"")
    (tmp_path / "pools" / "round_000008.npy").mkdir()
    assert figures.load_pools(run).keys() == whole.keys()


def test_a_report_of_unfinished_runs_alone_is_an_input_error_that_names_the_first(tmp_path):
    (make_run(tmp_path / "run") / "result.json").unlink()
    with pytest.raises(InputError, match=r"no finished run among 1 run; the first, .*run: no result\.json"):
        write_report([tmp_path], tmp_path / "report")
    assert not (tmp_path / "report").exists()


# --- experiments and their names


def test_seeds_and_where_it_ran_make_no_experiment_of_their_own(tmp_path):
    make_run(tmp_path / "a", "seed=3", "runtime.workers=2")
    make_run(tmp_path / "b", "seed=1", "tracking.tensorboard=false", "runtime.precision=bfloat16")
    assert names(groups_of(tmp_path)) == [("fashion-mnist-small, alpha 0.1", "pfpt", (1, 3))]


def test_different_data_under_one_name_are_different_experiments(tmp_path):
    for digest in ("a" * 16, "b" * 16):
        for seed in (0, 1):
            make_run(tmp_path / f"{digest[0]}{seed}", f"seed={seed}", data={"digest": digest})
    assert names(groups_of(tmp_path)) == [
        ("digest aaaaaaaa", "pfpt", (0, 1)),
        ("digest bbbbbbbb", "pfpt", (0, 1)),
    ]
    make_run(tmp_path / "old", "seed=2")
    assert ("digest unknown", "pfpt", (2,)) in names(groups_of(tmp_path))


def test_equal_data_in_two_folders_is_one_experiment(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"photos{seed}").mkdir()
        keys = (f"seed={seed}", "data.name=folder", f"data.root={tmp_path / f'photos{seed}'}")
        make_run(tmp_path / str(seed), *keys, data={"digest": "a" * 16})
    assert [group.seeds for group in groups_of(tmp_path)] == [(0, 1)]


def test_results_from_before_digests_are_seeds_of_the_same_experiment(tmp_path):
    make_run(tmp_path / "old", "seed=0")
    make_run(tmp_path / "new", "seed=1", data={"digest": "a" * 16})
    assert [group.seeds for group in groups_of(tmp_path)] == [(0, 1)]


def test_a_repeated_experiment_and_seed_is_left_out_and_named(tmp_path):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    groups, repeated = make_groups(find([tmp_path])[0])
    assert [len(group.runs) for group in groups] == [1]
    assert [(item.folder.name, item.why) for item in repeated] == [
        ("b", f"the same experiment and seed as {tmp_path / 'a'}")
    ]


def test_what_varies_names_settings_and_methods_and_rates_stand_beside(tmp_path):
    pool = ("algorithm.name=fedavg", "prompt.kind=pool")
    for number, keys in enumerate(
        [
            ("partition.alpha=0.5", "algorithm.name=pfpt", "local.prompt_lr=1e-3"),
            ("partition.alpha=0.05", "algorithm.name=pfpt", "local.prompt_lr=1e-3"),
            ("partition.alpha=0.05", *pool, "local.prompt_lr=3e-3"),
            ("partition.alpha=0.05", "algorithm.name=fedavg", "local.prompt_lr=3e-3", "head.personal=true"),
            ("partition.kind=dominant", "algorithm.name=head"),
        ]
    ):
        make_run(tmp_path / str(number), *keys, validation=0.9 - number / 10)
    groups = groups_of(tmp_path)
    assert [(group.setting, group.method, group.rates) for group in groups] == [
        ("alpha 0.05", "pfpt", "lr 0.0005, prompt_lr 0.001"),
        ("alpha 0.05", "fedavg, pool", "lr 0.0005, prompt_lr 0.003"),
        ("alpha 0.05", "fedavg, personal heads", "lr 0.001, prompt_lr 0.003"),
        ("alpha 0.5", "pfpt", "lr 0.0005, prompt_lr 0.001"),
        ("dominant", "head", "lr 0.001"),
    ], "the dominant partition ignores alpha; the head alone has no prompts to tune; best on validation first"


def test_trials_of_a_search_are_told_apart_by_their_rates_and_nothing_else_is(tmp_path):
    for rate in ("5e-4", "1e-3"):
        make_run(tmp_path / rate, "algorithm.name=fedavg", f"local.lr={rate}", accuracy=float(rate))
    make_run(tmp_path / "head", "algorithm.name=head", accuracy=0)
    assert [(group.method, group.family, group.rates) for group in groups_of(tmp_path)] == [
        ("fedavg, lr 0.001", "fedavg", ""),
        ("fedavg, lr 0.0005", "fedavg", ""),
        ("head", "head", "lr 0.001"),
    ]


def test_a_methods_own_setting_names_it_only_where_it_varies_within_a_method(tmp_path):
    make_run(tmp_path / "scaffold", "algorithm.name=scaffold", "algorithm.form=reference")
    make_run(tmp_path / "paper", "algorithm.name=fedprox")
    assert {group.method for group in groups_of(tmp_path)} == {"fedprox", "scaffold"}
    make_run(tmp_path / "reference", "algorithm.name=fedprox", "algorithm.form=reference")
    assert {group.method for group in groups_of(tmp_path)} == {"fedprox", "fedprox, reference", "scaffold, reference"}


def test_what_a_name_does_not_say_is_told_in_the_report(tmp_path):
    make_run(tmp_path / "run", "algorithm.name=scaffold", "algorithm.form=reference", "local.epochs=3")
    write_report([tmp_path], tmp_path / "report")
    line = "- scaffold: `algorithm.name=scaffold prompt.kind=prompt algorithm.form=reference local.epochs=3`"
    assert line in (tmp_path / "report" / "report.md").read_text()


def test_a_run_that_is_older_than_a_setting_has_its_default(tmp_path):
    make_run(tmp_path / "new", "seed=0")
    old = make_run(tmp_path / "old", "seed=1") / "config.yaml"
    tree = yaml.safe_load(old.read_text())
    del tree["federation"]["eval_every"]
    old.write_text(yaml.safe_dump(tree))
    assert [group.seeds for group in groups_of(tmp_path)] == [(0, 1)]


# --- statistics


def test_the_paired_test_is_scipys_on_shared_seeds_against_the_best_on_validation(tmp_path):
    make_methods(tmp_path, {"pfpt": [0.50, 0.55, 0.45, 0.60], "fedavg": [0.58, 0.61, 0.56], "head": [0.40, 0.52, 0.41]})
    found = compare(groups_of(tmp_path))
    assert {c.method: c.baseline for c in found.values()} == {"fedavg": "pfpt", "pfpt": "fedavg", "head": "fedavg"}
    ours, theirs = np.array([0.50, 0.55, 0.45]), np.array([0.58, 0.61, 0.56])
    pfpt = found["pfpt"]
    assert pfpt.seeds == (0, 1, 2)
    assert pfpt.difference == pytest.approx(-0.25 / 3)
    assert pfpt.p_t == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    half = stats.t.ppf(0.975, 2) * np.std(ours - theirs, ddof=1) / math.sqrt(3)
    assert (pfpt.low, pfpt.high) == (pytest.approx(-0.25 / 3 - half), pytest.approx(-0.25 / 3 + half))
    assert pfpt.p_wilcoxon is None
    # Two tests were made: fedavg and pfpt are each other's baseline.
    smaller, larger = sorted([pfpt.p_t, found["head"].p_t])
    assert sorted({found[m].p_t_holm for m in found}) == [
        pytest.approx(p) for p in sorted({2 * smaller, max(2 * smaller, larger)})
    ]
    assert found["fedavg"].p_t_holm == pfpt.p_t_holm


def test_the_baseline_is_chosen_on_validation_not_on_test(tmp_path):
    for seed in (0, 1):
        for method, accuracy, validation in (("pfpt", 0.9, 0.1), ("fedavg", 0.5, 0.6), ("head", 0.4, 0.3)):
            keys = (f"algorithm.name={method}", f"seed={seed}")
            make_run(tmp_path / f"{method}{seed}", *keys, accuracy=accuracy + seed / 100, validation=validation)
    assert {m: c.baseline for m, c in compare(groups_of(tmp_path)).items()} == {
        "fedavg": "head",
        "head": "fedavg",
        "pfpt": "fedavg",
    }


def test_six_seeds_have_wilcoxons_test_too(tmp_path):
    ours, theirs = [0.50, 0.52, 0.54, 0.51, 0.55, 0.58], [0.45, 0.46, 0.51, 0.49, 0.54, 0.50]
    make_methods(tmp_path, {"pfpt": ours, "fedavg": theirs})
    found = compare(groups_of(tmp_path))["pfpt"]
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(ours, theirs).pvalue)
    assert found.p_wilcoxon == found.p_wilcoxon_holm == pytest.approx(smallest_wilcoxon_p(6)) == 0.03125
    assert comparison_table([found]).head[-2:] == ["p (Wilcoxon)", "Holm"]


def test_equal_differences_have_neither_an_interval_nor_a_p(tmp_path):
    make_methods(tmp_path, {"pfpt": [0.5, 0.5], "fedavg": [0.25, 0.25]})
    assert comparison_table([compare(groups_of(tmp_path))["pfpt"]]).rows == [
        ["pfpt", "fedavg", "0 1", "+25.0", "–", "–", "–"]
    ]


@pytest.mark.parametrize(
    ("p", "corrected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.5, 0.4], [0.8, 0.8]),
        ([0.02], [0.02]),
        ([], []),
        ([0.01, math.nan], [0.02, math.nan]),
    ],
)
def test_holm_by_hand(p, corrected):
    assert holm(p) == pytest.approx(corrected, nan_ok=True)


# --- tables


def test_a_row_has_mean_and_sample_deviation_in_percent_and_the_best_is_bold(tmp_path):
    make_methods(tmp_path, {"fedavg": [0.5, 0.6, 0.7], "pfpt": [0.4, 0.4, 0.4]})
    table = setting_table(groups_of(tmp_path))
    rows = {row[0]: dict(zip(table.head, row)) for row in table.rows}
    assert table.head == ["method", "seeds", *(column.head for column in COLUMNS.values())]
    assert rows["fedavg"] == {
        **{"method": "fedavg", "seeds": "3", "worst decile": "–", "own clients": "40.0 ± 0.0"},
        **dict.fromkeys(("best", "last", "last ten", "validation"), "60.0 ± 10.0"),
        **{"MB/round": "2.00", "saved (%)": "90.00", "s/round": "2.0"},
    }
    bold = {(table.rows[i][0], table.head[j]) for i, j in table.bold}
    assert {column for method, column in bold if method == "pfpt"} == {
        "own clients",
        "MB/round",
        "saved (%)",
        "s/round",
    }
    assert {column for _, column in bold} == set(table.head) - {"method", "seeds", "worst decile"}
    assert "| **60.0 ± 10.0** |" in table.markdown()


def test_one_seed_has_no_deviation_and_is_not_bold_beside_three(tmp_path):
    make_methods(tmp_path, {"fedavg": [0.5, 0.5, 0.5], "pfpt": [0.9], "head": [0.1, 0.1, 0.1]})
    table = setting_table(groups_of(tmp_path))
    assert (table.rows[0][0], table.rows[0][2]) == ("pfpt", "90.0")
    assert {table.rows[i][0] for i, _ in table.bold if table.head[_] == "best"} == {"fedavg"}


def test_latex_escapes_what_it_would_read_as_a_command():
    assert latex(r"a_b & 5% #1 {x} $ ~ ^ \n") == (
        r"a\_b \& 5\% \#1 \{x\} \$ \textasciitilde{} \textasciicircum{} \textbackslash{}n"
    )
    text = Table(["method", "rates", "95 %"], [["f_a", "", "1.0 ± 0.1"]], frozenset({(0, 2)})).latex("50 % of_it", "x")
    assert r"\begin{tabular}{@{}llr@{}}" in text
    assert r"method & rates & 95 \% \\" in text
    assert r"f\_a &  & \textbf{1.0 $\pm$ 0.1} \\" in text
    assert r"\caption{50 \% of\_it}" in text
    assert re.findall(r"\\(top|mid|bottom)rule", text) == ["top", "mid", "bottom"]


def test_a_pipe_in_a_name_does_not_break_a_markdown_table():
    assert Table(["a"], [["x|y"]]).markdown() == "| a |\n| --- |\n| x\\|y |\n"


# --- the whole


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two settings with two methods on three seeds, a run under way, and a sweep's results.csv."""
    folder = tmp_path_factory.mktemp("runs")
    for alpha in (0.1, 1):
        accuracies = {"fedavg": [0.51 + alpha / 10, 0.62, 0.7], "pfpt": [0.4, 0.43, 0.41 + alpha / 10]}
        make_methods(folder / f"a{alpha}", accuracies, f"partition.alpha={alpha}")
    (make_run(folder / "a1" / "unfinished", "seed=9", "partition.alpha=1") / "result.json").unlink()
    (folder / "results.csv").write_text(
        "trial,status,reason\n000-ok,done,\n001-bad,failed,MemoryError: out of memory\n"
    )
    write_report([folder], folder / "report")
    return folder / "report"


def test_the_report_embeds_its_figures_and_names_what_is_left_out(written):
    text = (written / "report.md").read_text()
    embedded = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert set(embedded) == {path.name for path in written.glob("*.png")}
    kinds = ("accuracy", "rounds", "bytes", "clients")
    assert set(embedded) == {"alpha.png", *(f"{kind}-alpha-{a}.png" for kind in kinds for a in ("0.1", "1"))}
    for name in embedded:
        assert Image.open(written / name).width >= 500
    assert "12 finished runs of 4 experiments; 1 do not count" in text
    assert "a1/unfinished`: no result.json: stopped, failed or under way, round 3 of 3" in text
    assert "001-bad: MemoryError: out of memory" in text
    assert "000-ok" not in text
    assert text.index("## alpha 0.1\n") < text.index("## alpha 1\n")
    assert "cannot fall below p = 0.25" in text


def test_the_raw_table_has_all_digits_and_a_row_per_method_and_setting(written):
    table = pd.read_csv(written / "table.csv").set_index(["setting", "method"])
    assert sorted(table.index) == [(f"alpha {a}", method) for a in ("0.1", "1") for method in ("fedavg", "pfpt")]
    row = table.loc[("alpha 0.1", "fedavg")]
    assert row.last10_mean == pytest.approx(np.mean([0.52, 0.62, 0.7]), rel=1e-14)
    assert row.last10_std == pytest.approx(np.std([0.52, 0.62, 0.7], ddof=1), rel=1e-14)
    assert (row.bytes_per_round_mean, row.saved_mean, row["partition.alpha"]) == (2e6, pytest.approx(0.9), 0.1)
    test = stats.ttest_rel([0.52, 0.62, 0.7], [0.4, 0.43, 0.42])
    assert row.compared_p_t == pytest.approx(test.pvalue)
    assert row.compared_p_t == pytest.approx(row.compared_p_t_holm), "one pair, one test"
    assert math.isnan(row.worst_decile_mean)


def test_every_line_of_a_latex_table_has_as_many_cells_as_its_columns(written):
    text = (written / "table.tex").read_text()
    tables = re.findall(r"\\begin\{tabular\}\{@\{\}(.+?)@\{\}\}(.+?)\\end\{tabular\}", text, re.S)
    assert len(tables) == 4
    for columns, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) == 3
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert text.isascii()


def test_methods_that_share_no_two_seeds_are_not_tested_and_their_seeds_are_told(tmp_path):
    make_methods(tmp_path / "first", {"fedavg": [0.5]})
    for seed in (7, 8, 9):
        make_run(tmp_path / str(seed), "algorithm.name=head", f"seed={seed}", accuracy=0.4)
    write_report([tmp_path], tmp_path / "report")
    told = "No test: no two methods share two seeds or more (fedavg: seed 0; head: seeds 7, 8, 9)."
    assert told in (tmp_path / "report" / "report.md").read_text()
    make_methods(tmp_path / "second", {"scaffold": [0.5, 0.6], "fedprox": [0.4, 0.3]})
    write_report([tmp_path], tmp_path / "report")
    told = "share fewer than two seeds with every other: fedavg: seed 0; head: seeds 7, 8, 9."
    assert told in (tmp_path / "report" / "report.md").read_text()


def test_captions_and_names_fit_into_figures_of_two_methods(tmp_path):
    make_methods(tmp_path, {"fedavg": [0.5, 0.6], "pfpt": [0.4, 0.5]})
    for figure in (figures.accuracy_over_rounds(groups_of(tmp_path)), figures.accuracy_of_seeds(groups_of(tmp_path))):
        pixels(figure)
        texts = [*figure.texts, *(text for axes in figure.axes for text in (axes.title, axes.xaxis.label))]
        assert any(text.get_text().endswith(")") for text in texts), "a caption"
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.x1 <= figure.bbox.width, text


def test_names_of_methods_are_no_mathematics_in_figures(tmp_path):
    (group, *_) = groups_of(make_run(tmp_path / "run"))
    pixels(figures.accuracy_of_seeds([replace(group, method=r"mine $x^_$ \frac{1}")]))
    pixels(figures.accuracy_over_rounds([replace(group, method="$10")]))


def test_prompts_are_mapped_by_tsne_only_where_it_is_asked_for(monkeypatch):
    pools = {round: np.random.default_rng(round).normal(size=(4, 6)) for round in range(3)}
    asked = figures.trajectory(pools, tsne=True)
    assert "t-SNE" in asked.axes[0].get_xlabel()
    monkeypatch.setattr("sklearn.manifold.TSNE", None)
    assert "first principal component" in figures.trajectory(pools).axes[0].get_xlabel()


def test_progress_names_every_setting(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "partition.alpha=0.5")
    lines = []
    write_report([tmp_path], tmp_path / "report", lines.append)
    assert lines == [
        "finished runs: 2, left out: 0",
        "setting 1 of 2: drawing the figures of alpha 0.1",
        "setting 2 of 2: drawing the figures of alpha 0.5",
    ]


# --- a sweep's verdict


def test_a_verdict_has_a_row_per_method_and_level_and_the_best_of_each_level(tmp_path):
    make_methods(tmp_path / "skewed", {"fedavg": [0.5, 0.7], "pfpt": [0.4, 0.4]}, "partition.alpha=0.1")
    make_methods(tmp_path / "even", {"fedavg": [0.8, 0.8], "pfpt": [0.9, 0.9]}, "partition.alpha=5")
    make_run(tmp_path / "lucky", "algorithm.name=head", "partition.alpha=5", accuracy=0.99)
    lines = [line.split() for line in verdict(tmp_path).splitlines()]
    assert lines[0] == ["setting", "method", "seeds", "validation", "test,", "last", "ten"]
    rows = {(line[1], line[2]): " ".join(line[3:]) for line in lines[1:6]}
    assert rows == {
        ("0.1", "fedavg"): "2 60.0 ± 14.1 60.0 ± 14.1",
        ("0.1", "pfpt"): "2 40.0 ± 0.0 40.0 ± 0.0",
        ("5", "fedavg"): "2 80.0 ± 0.0 80.0 ± 0.0",
        ("5", "pfpt"): "2 90.0 ± 0.0 90.0 ± 0.0",
        ("5", "head"): "1 99.0 99.0",
    }
    assert verdict(tmp_path).splitlines()[6:] == [
        "best on validation, alpha 0.1: fedavg, of 2 methods with 2 seeds: 60.0 ± 14.1 %, test 60.0 ± 14.1 %",
        "best on validation, alpha 5: pfpt, of 2 methods with 2 seeds: 90.0 ± 0.0 %, test 90.0 ± 0.0 %",
    ], "one lucky seed is not best"


def test_a_verdict_without_a_finished_trial_says_so(tmp_path):
    (make_run(tmp_path / "run") / "result.json").unlink()
    assert verdict(tmp_path) == "no trial has finished"


def test_the_command_reports_real_runs_and_bad_input_has_code_2(tmp_path, capsys):
    for method in ("pfpt", "fedavg"):
        config = load(None, [*tiny.TINY, f"algorithm.name={method}", "data.limit=300"])
        with new_run(tmp_path / method, config, overwrite=False):
            for _ in run_in_process(config, tmp_path / method):
                pass
    main.main(["report", str(tmp_path)])
    assert capsys.readouterr().out.startswith(f"written: {tmp_path}/report/report.md")
    pictures = {path.name.split("-")[0] for path in (tmp_path / "report").glob("*.png")}
    assert pictures >= {"accuracy", "rounds", "bytes", "clients", "trajectory"}
    table = pd.read_csv(tmp_path / "report" / "table.csv").set_index("method")
    result = json.loads((tmp_path / "pfpt" / "result.json").read_text())
    assert table.loc["pfpt"].last10_mean == pytest.approx(result["last10"]["accuracy"])
    assert len(result["clients"]["accuracies"]) == 6
    with pytest.raises(SystemExit) as end:
        main.main(["report", str(tmp_path / "nowhere")])
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_settings_count_where_a_name_comes_from_another_package():
    of_ours = {"prompt.kind": "none", "local.optimizer": "adam"}
    assert not groups._matters("prompt.length", of_ours)
    assert not groups._matters("local.momentum", of_ours)
    of_theirs = {"prompt.kind": "theirs", "local.optimizer": "theirs"}
    assert groups._matters("prompt.length", of_theirs)
    assert groups._matters("local.momentum", of_theirs)
    assert not groups._matters("prompt.length", {"prompt.kind": None})
