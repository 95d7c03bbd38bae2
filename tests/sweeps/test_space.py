"""A sweep file becomes a list of checked trials, always the same one, or one line that says what is wrong with it."""

from itertools import product
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fedprompt.cli import main
from fedprompt.errors import InputError
from fedprompt.sweeps.space import expand
from fedprompt.sweeps.sweep_file import read

READY = sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml"))
BASE = {"federation": {"rounds": 3}, "partition.kind": "dirichlet"}


@pytest.fixture
def trials_of(tmp_path):
    """Write a sweep file and expand it."""

    def make(*overrides, **keys):
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"base": BASE, **keys}, sort_keys=False))
        return expand(read(path, overrides))

    return make


def values(trials, *keys):
    return [tuple(trial.swept.get(key) for key in keys) for trial in trials]


def test_a_grid_gives_all_combinations_in_the_files_order(trials_of):
    trials = trials_of(space={"partition.alpha": {"grid": [5, 0.1]}, "seed": {"grid": [0, 1, 2]}})
    assert values(trials, "partition.alpha", "seed") == list(product([5, 0.1], [0, 1, 2]))
    assert [trial.config.partition.alpha for trial in trials] == [5, 5, 5, 0.1, 0.1, 0.1]
    assert trials[4].name == "004-alpha0.1-seed1"
    assert [trial.number for trial in trials] == list(range(6))


def test_base_takes_nested_and_dotted_keys_and_overrides_win(trials_of):
    base = {"federation": {"rounds": 3, "clients": 9}, "federation.cohort": 4, "partition": None}
    trials = trials_of("federation.rounds=7", base=base, space={"seed": {"grid": [0]}})
    federation = trials[0].config.federation
    assert (federation.rounds, federation.clients, federation.cohort) == (7, 9, 4)


def test_a_condition_adds_its_keys_only_where_it_holds(trials_of):
    trials = trials_of(
        space={"algorithm.name": {"grid": ["pfpt", "fedavg", "fedprox"]}},
        when=[
            {"if": {"algorithm.name": "pfpt"}, "space": {"algorithm.schedule": {"grid": ["sequential", "joint"]}}},
            {"if": {"algorithm.schedule": "joint"}, "space": {"algorithm.sweeps": {"grid": [5]}}},
            {"if": {"algorithm.name": ["fedavg", "fedprox"]}, "space": {"local.lr": {"grid": ["1e-4"]}}},
        ],
    )
    assert values(trials, "algorithm.name", "algorithm.schedule", "algorithm.sweeps", "local.lr") == [
        ("pfpt", "sequential", None, None),
        ("pfpt", "joint", 5, None),
        ("fedavg", None, None, 1e-4),
        ("fedprox", None, None, 1e-4),
    ]
    assert trials[1].config.algorithm.settings["sweeps"] == 5


def test_a_condition_may_ask_for_a_value_of_base_or_a_default(trials_of):
    when = [
        {"if": {"partition.kind": "dirichlet"}, "space": {"partition.alpha": {"grid": [0.3]}}},
        {"if": {"head.kind": "mlp"}, "space": {"head.hidden": {"grid": [64]}}},
    ]
    (trial,) = trials_of(space={"seed": {"grid": [4]}}, when=when)
    assert (trial.config.partition.alpha, trial.config.head.hidden) == (0.3, 64)


def test_every_grid_point_is_drawn_so_often(trials_of):
    space = {
        "algorithm.name": {"grid": ["pfpt", "fedavg"]},
        "local.lr": {"loguniform": ["1e-4", 1e-2]},
        "head.dropout": {"uniform": [0.2, 0.4]},
        "prompt.length": {"randint": [3, 5]},
        "head.kind": {"choice": ["mlp", "linear"]},
    }
    trials = trials_of(space=space, samples=60)
    assert [trial.config.algorithm.name for trial in trials] == ["pfpt"] * 60 + ["fedavg"] * 60
    rates = sorted(trial.config.local.lr for trial in trials)
    assert len(set(rates)) > 100
    assert 1e-4 <= rates[0] < 2e-4 < 5e-3 < rates[-1] <= 1e-2
    assert 5e-4 < rates[60] < 2e-3  # the middle of a logarithmic range is its geometric mean
    assert all(0.2 <= trial.config.head.dropout <= 0.4 for trial in trials)
    assert {trial.config.prompt.length for trial in trials} == {3, 4, 5}
    assert {trial.config.head.kind for trial in trials} == {"mlp", "linear"}


def test_what_only_a_condition_draws_is_drawn_there_alone(trials_of):
    when = [{"if": {"algorithm.name": "fedprox"}, "space": {"algorithm.mu": {"loguniform": [1e-4, 1]}}}]
    trials = trials_of(space={"algorithm.name": {"grid": ["fedprox", "fedavg"]}}, when=when, samples=3)
    assert [trial.config.algorithm.name for trial in trials] == ["fedprox"] * 3 + ["fedavg"]
    assert len({trial.swept["algorithm.mu"] for trial in trials[:3]}) == 3


def test_the_same_file_gives_the_same_trials_and_another_seed_others(trials_of):
    space = {"local.lr": {"loguniform": [1e-4, 1e-2]}, "seed": {"grid": [0, 1]}}
    first, second, third = (trials_of(space=space, samples=3, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert values(first, "local.lr") != values(third, "local.lr")


def test_what_was_drawn_twice_is_one_trial(trials_of):
    trials = trials_of(space={"prompt.length": {"randint": [3, 4]}}, samples=20)
    assert sorted(values(trials, "prompt.length")) == [(3,), (4,)]


def test_the_copy_of_a_sweep_gives_the_same_trials(tmp_path):
    for path in READY:
        sweep = read(path, ["federation.rounds=30"])
        copy = tmp_path / path.name
        copy.write_text(sweep.to_yaml())
        assert read(copy) == sweep
        assert expand(read(copy)) == expand(sweep)


def test_trials_have_a_worker_and_storage_of_their_own(trials_of):
    first, second = trials_of("runtime.storage=memory://bucket/", space={"seed": {"grid": [0, 1]}})
    assert first.config.runtime.workers == 1
    assert first.config.runtime.storage == "memory://bucket/000-seed0"
    assert second.config.runtime.storage == "memory://bucket/001-seed1"


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_files_expand(path):
    trials = expand(read(path))
    assert len({trial.name for trial in trials}) == len(trials) >= 12
    assert read(path).about


SEEDS = {"seed": {"grid": [0, 1]}}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"space": SEEDS, "sampels": 2}, "sampels: unknown key (did you mean 'samples'?)"),
        ({"space": SEEDS, "samples": 0}, "samples: found 0; allowed: "),
        ({"space": SEEDS, "samples": 2}, "samples: 2, but nothing in the space is drawn"),
        ({"space": SEEDS, "scheduler": "ashe"}, "scheduler: found 'ashe' (did you mean 'asha'?)"),
        ({"space": SEEDS, "grace_rounds": 2}, "grace_rounds: 2 means nothing with scheduler = 'none'"),
        ({"space": SEEDS, "scheduler": "asha"}, "grace_rounds: 5 is more than federation.rounds = 3"),
        ({"space": SEEDS, "personalize": 3}, "personalize: found 3"),
        ({"space": SEEDS, "personalize": {"epoch": 3}}, "personalize.epoch: unknown key (did you mean 'epochs'?)"),
        ({"space": SEEDS, "personalize": {"lr": [0]}}, "personalize.lr.0: found 0; allowed: greater than 0"),
        ({"space": SEEDS, "personalize": {"clients": 99}}, "personalize.clients: 99 is more than"),
        ({}, "space: "),
        ({"space": {}}, "space: is empty"),
        ({"space": {"partition.alpa": {"grid": [1]}}}, "partition.alpa: unknown key (did you mean 'alpha'?)"),
        ({"space": {"partition.alpha": {"grid": [1, -1]}}}, "partition.alpha: found -1; allowed: greater than 0"),
        ({"space": {"partition.alpha": {"grid": 1}}}, "space.partition.alpha.grid: found 1; allowed: a list"),
        ({"space": {"partition.alpha": [1]}}, "space.partition.alpha: found [1]; allowed: grid, choice"),
        ({"space": {"seed": {"girds": [1]}}}, "space.seed: unknown kind 'girds' (did you mean 'grid'?)"),
        ({"space": {"local.lr": {"loguniform": [0, 1]}}}, "space.local.lr.loguniform: found [0, 1]; allowed: "),
        ({"space": {"local.lr": {"uniform": [2, 1]}}}, "space.local.lr.uniform: found [2, 1]; allowed: "),
        ({"space": {"local.lr": {"uniform": [2]}}}, "space.local.lr.uniform: found [2]; allowed: "),
        ({"space": {"seed": {"randint": [0.5, 2]}}}, "space.seed.randint: found [0.5, 2]; allowed: "),
        ({"space": {"seed": {"grid": [1, 1]}}}, "space: seed1 is there twice"),
        ({"space": {"algorithm.name": {"grid": ["pftp"]}}}, "algorithm.name: "),
        ({"space": {"algorithm.sweps": {"grid": [1]}}}, "algorithm.sweps: unknown key (did you mean 'sweeps'?)"),
        ({"space": SEEDS, "base": {"federation": 3}}, "federation: found 3"),
        ({"space": SEEDS, "base": {"federation": {"cohort": 99}}}, "federation.cohort: 99 is larger than"),
        ({"space": SEEDS, "when": [{"iff": {}}]}, "when[0].iff: unknown key (did you mean 'if'?)"),
        ({"space": SEEDS, "when": [{"if": {"seed": 1}}]}, "when[0].space: found None"),
        ({"space": SEEDS, "when": [{"if": {"sed": 1}, "space": SEEDS}]}, "when[0].if.sed: unknown key (did you mean"),
        (
            {"space": SEEDS, "when": [{"if": {"algorithm.name": "pftp"}, "space": {"local.lr": {"grid": [1]}}}]},
            "when[0].if: no trial has algorithm.name = ['pftp']",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_the_file_and_the_key(tmp_path, keys, line):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, **keys}))
    output = tmp_path / "output"
    end = CliRunner().invoke(main, ["sweep", str(path), "--output", str(output)])
    assert end.exit_code == 2
    assert end.stderr.startswith(f"fedprompt: {path}: {line}")
    assert end.stderr.count("\n") == 1
    assert not output.exists()


def test_an_override_cannot_go_against_the_space(trials_of):
    with pytest.raises(InputError, match=r"seed: .*sweep\.yaml varies it"):
        trials_of("seed=3", space=SEEDS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "SWEEP.yaml: missing"),
        (["--resume"], "--resume: needs --output DIR"),
        (["nowhere.yaml"], "nowhere.yaml: is missing"),
        (["--resume", "--output", "nowhere"], "--resume: no sweep in nowhere"),
        ([str(READY[0]), "--output", str(READY[0].parent)], "--output: "),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(arguments, line):
    end = CliRunner().invoke(main, ["sweep", *arguments])
    assert (end.exit_code, end.stderr.count("\n")) == (2, 1)
    assert end.stderr.startswith(f"fedprompt: {line}")


def test_a_key_that_only_some_methods_have_is_refused_with_the_way_to_give_it_to_them(trials_of):
    space = {"algorithm.name": {"grid": ["fedprox", "fedavg"]}, "algorithm.mu": {"grid": [0, 1]}}
    with pytest.raises(InputError, match=r"^algorithm\.mu: not a key of 'fedavg' but of .*fedprox.* when:, with if: "):
        trials_of(space=space)
    names = {"algorithm.name": space["algorithm.name"]}
    when = [{"if": {"algorithm.name": "fedprox"}, "space": {"algorithm.mu": space["algorithm.mu"]}}]
    assert len(trials_of(space=names, when=when)) == 3


def test_a_key_of_no_method_gets_no_such_advice(trials_of):
    with pytest.raises(InputError) as caught:
        trials_of(space={"algorithm.name": {"grid": ["fedprox", "fedavg"]}, "algorithm.nu": {"grid": [0]}})
    assert "when" not in str(caught.value)


def test_a_key_with_a_dot_and_nested_is_a_duplicate(trials_of):
    with pytest.raises(InputError, match=r"base: partition\.kind is there twice"):
        trials_of(base={"partition": {"kind": "iid"}, "partition.kind": "shards"}, space=SEEDS)


def test_a_condition_on_true_does_not_hold_for_1(trials_of):
    with pytest.raises(InputError, match="no trial has seed"):
        trials_of(space=SEEDS, when=[{"if": {"seed": True}, "space": {"local.lr": {"grid": [1]}}}])


@pytest.mark.parametrize(
    "space",
    [
        {f"local.{name}": {"grid": list(range(1, 100))} for name in ("epochs", "batch_size", "lr", "prompt_lr")},
        {"seed": {"grid": list(range(2000))}, "local.lr": {"uniform": [0, 1]}},
    ],
)
def test_too_many_trials_are_refused_before_any_is_made(trials_of, space):
    with pytest.raises(InputError, match=r"space: makes [\d,]+ trials; allowed: at most 10,000"):
        trials_of(space=space, samples=10 if "seed" in space else 1)


@pytest.mark.parametrize(
    "ends", [[0, 10**30], [-1e308, 1e308], [False, 2], [0, float("inf")], [0, 1, 2], ["a", "b"], {}]
)
@pytest.mark.parametrize("kind", ["uniform", "randint", "loguniform"])
def test_a_range_that_nothing_can_be_drawn_from_is_refused(trials_of, kind, ends):
    with pytest.raises(InputError, match=rf"space\.seed\.{kind}: found "):
        trials_of(space={"seed": {kind: ends}})


@pytest.mark.parametrize("name", [["pfpt"], {"a": 1}, 3])
def test_a_base_that_is_wrong_is_told_before_conditions_are_looked_at(trials_of, name):
    when = [{"if": {"head.kind": "mlp"}, "space": {"local.lr": {"grid": [1]}}}]
    with pytest.raises(InputError, match=r"^algorithm"):
        trials_of(base={"algorithm": {"name": name}}, space=SEEDS, when=when)


def test_the_hint_for_a_methods_key_names_a_method_of_the_grid(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "space: {algorithm.name: {grid: [fedavg, fedprox]}, algorithm.mu: {grid: [0.1, 1]}}\n", encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"goes below when:, with if: \{algorithm\.name: fedprox\}"):
        expand(read(path))
