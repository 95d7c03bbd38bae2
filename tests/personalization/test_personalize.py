"""Clients of a run go on tuning: where they start, what is measured on the way, and that only that matters."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from tiny import TINY

from fedprompt.cli import main
from fedprompt.client import personal
from fedprompt.config.parsing import load
from fedprompt.models.params import HEAD, Params
from fedprompt.personalization import personalize as personalizing
from fedprompt.personalization import trade_off
from fedprompt.personalization.personalize import personalize, planned, run
from fedprompt.runtime.build import build_algorithm, divided_data
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.pool import InProcessPool
from fedprompt.runtime.run import new_run, run_in_process
from fedprompt.runtime.scoring import subsample

SHORT = ("personalize.lr=0.01", "personalize.epochs=1", "personalize.interpolation=[]")
MODEL = ["client", *trade_off.MODEL]


@pytest.fixture(scope="module")
def fedavg(tmp_path_factory):
    """A run of FedAvg on prompts, of which most tests personalize the clients."""
    return federated(tmp_path_factory.mktemp("fedavg") / "run", "algorithm.name=fedavg")


@pytest.fixture
def tuned(tmp_path):
    """Personalize a run in this process, into a new folder; returns the rows of personalize.csv."""
    torch.set_num_threads(1)

    def tune(folder, *overrides):
        output = tmp_path / f"personal{len(list(tmp_path.glob('personal*')))}"
        run(planned(folder, overrides, output), local=True, say=lambda line: None)
        return rows_of(output)

    return tune


@pytest.fixture
def updates(monkeypatch):
    """What training gives back, {client: update} of the last personalization."""
    seen, train_group = {}, personal.train_group

    def watched(*arguments):
        made = train_group(*arguments)
        seen.update({update.client: update for update in made})
        return made

    monkeypatch.setattr(personal, "train_group", watched)
    return seen


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Call the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = 0
        try:
            main.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def federated(folder, *overrides):
    """A tiny run, as the command leaves it."""
    torch.set_num_threads(1)
    config = load(None, [*TINY, *overrides])
    with new_run(folder, config, overwrite=False):
        list(run_in_process(config, folder))
    return folder


def rows_of(output):
    return pd.read_csv(output / "personalize.csv", converters={"lr": float})


def own(rows):
    """The rows of clients' own models."""
    return rows[(rows["lambda"] == 1) & ~rows.averaged]


def sent(folder) -> dict[int, Params]:
    """What the method would send each client."""
    config, state = load(folder / "config.yaml"), CheckpointStore(str(folder / "checkpoints")).latest().state
    return {client: build_algorithm(config).broadcast(state, client) for client in range(config.federation.clients)}


def same(first: Params, second: Params) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_after_no_epoch_clients_are_scored_as_the_run_scored_them(fedavg, tuned):
    rows = tuned(fedavg, "personalize.epochs=0")
    result = json.loads((fedavg / "result.json").read_text())
    assert set(rows.epoch) == {0}
    for _, of_rate in own(rows).groupby("lr"):
        assert list(of_rate.personal_accuracy) == pytest.approx(result["clients"]["accuracies"], abs=1e-12)
        assert of_rate.robust_accuracy.nunique() == 1


def test_notes_about_the_data_are_told(fedavg, tmp_path, monkeypatch):
    divided, said = personalizing.divided_data, []
    noted = lambda config: replace(divided(config), notes=("PHOTOS: not read: folders",))  # noqa: E731
    monkeypatch.setattr(personalizing, "divided_data", noted)
    run(planned(fedavg, ("personalize.epochs=0",), tmp_path / "out"), local=True, say=said.append)
    assert "PHOTOS: not read: folders" in said


def test_clients_with_heads_of_their_own_start_with_them(tmp_path, tuned):
    folder = federated(tmp_path / "run", "algorithm.name=fedavg", "head.personal=true")
    rows = tuned(folder, "personalize.epochs=0", "personalize.interpolation=[]", "personalize.lr=1")
    clients = json.loads((folder / "result.json").read_text())["clients"]
    assert list(rows.personal_accuracy) == pytest.approx(clients["accuracies"], abs=1e-12)
    assert rows.robust_accuracy.mean() == pytest.approx(clients["own_head_global_accuracy"], abs=1e-12)
    assert rows.robust_accuracy.nunique() > 1


GROWING = ("algorithm.name=pfpt", "algorithm.sweeps=3", "local.prompt_lr=0.05", "federation.cohort=5")
STATES = {
    "pfpt, grown pool": GROWING,
    "fedavg, personal heads": ("algorithm.name=fedavg", "head.personal=true"),
    "pfedpg": ("algorithm.name=pfedpg",),
    "local": ("algorithm.name=local",),
    "lora": ("algorithm.name=fedavg", "prompt.kind=lora"),
    "adapter": ("algorithm.name=fedavg", "prompt.kind=adapter"),
    "full": ("algorithm.name=fedavg", "prompt.kind=full", "federation.clients=4"),
    "head alone": ("algorithm.name=head",),
    "scaffold, deep": ("algorithm.name=scaffold", "prompt.kind=deep"),
    "fedsgd": ("algorithm.name=fedsgd",),
    "centralized": ("algorithm.name=centralized",),
    "prompts at the input": ("algorithm.name=fedavg", "prompt.layer=0"),
}


@pytest.mark.parametrize("overrides", STATES.values(), ids=STATES)
def test_every_methods_state_is_personalized_from_what_it_sends(tmp_path, tuned, updates, overrides):
    folder = federated(tmp_path / "run", *overrides)
    rows = tuned(folder, *SHORT)
    params, config = sent(folder), load(folder / "config.yaml")
    if overrides is GROWING:
        assert len(params[0]["pool"]) != config.prompt.pool_size
    start, end = (own(rows)[own(rows).epoch == epoch] for epoch in (0, 1))
    assert list(start.client) == list(end.client) == list(range(config.federation.clients))
    data = divided_data(config)
    part, pool = subsample(data.test.labels, config.seed), InProcessPool(config, data)
    said = pool.predict_clients("test", params, dict.fromkeys(params, part))
    assert list(start.robust_accuracy) == [said[client].accuracy for client in params]
    said = pool.predict_clients("test", params, dict(enumerate(data.local_tests)))
    assert list(start.personal_accuracy) == [said[client].accuracy for client in params]
    assert np.isfinite(end.personal_loss).all()
    for client, update in updates.items():
        assert update.samples == len(data.clients[client])
        for name, value in update.params.items():
            tuned_one = name.startswith(HEAD) == (config.prompt.kind == "none")
            assert tuned_one or torch.equal(value, params[client][name]), name


def test_tuning_raises_a_skewed_clients_own_accuracy_and_forgets_the_others(fedavg, tuned):
    rows = own(tuned(fedavg, "personalize.lr=0.03", "personalize.trains=prompt+head"))
    means = rows.groupby("epoch")[["personal_accuracy", "robust_accuracy"]].mean()
    assert means.personal_accuracy[5] > means.personal_accuracy[0] + 0.3
    assert means.personal_accuracy[5] > means.robust_accuracy[5] + 0.3


def test_interpolation_ends_where_it_should_and_lies_between(fedavg, tuned):
    rows = tuned(fedavg, "personalize.lr=0.01", "personalize.epochs=2", "personalize.interpolation=[0, 0.5, 1]")
    alone = tuned(fedavg, "personalize.lr=0.01", "personalize.epochs=2", "personalize.interpolation=[]")
    scores = ["personal_loss", "robust_loss"]
    indexed = rows.set_index(["lambda", "client", "epoch"])[scores]
    pd.testing.assert_frame_equal(indexed.loc[1.0], alone.set_index(["client", "epoch"])[scores])
    for client in range(6):
        assert (indexed.loc[0.0].loc[client] == indexed.loc[0.0].loc[client].iloc[0]).all(axis=None)
        assert indexed.loc[0.0].loc[client].iloc[0].equals(indexed.loc[1.0].loc[client].loc[0])
        assert indexed.loc[0.5].loc[client].loc[2].personal_loss < indexed.loc[0.0].loc[client].loc[2].personal_loss


def test_a_constant_is_no_prompt_to_tune():
    """As a frozen query projection is."""
    tuning = personal.Tuning("adam", 1e-3, 1, "prompt", constants=("query_proj",))
    assert [tuning.moves(name) for name in ("pool", "query_proj", "head.1.bias")] == [True, False, False]
    start = {"pool": torch.zeros(2, 3), "query_proj": torch.ones(3, 3)}
    *_, (*_, last) = personal.models_on_the_way(start, [{"pool": torch.ones(2, 3)}], tuning)
    assert last["query_proj"] is start["query_proj"]
    assert last["pool"].all()


def test_models_on_the_way_are_these_by_hand():
    draw = torch.Generator().manual_seed(0)
    start, *ends = ({"prompt": torch.randn(2, 3, generator=draw), "head.1.bias": torch.ones(1)} for _ in range(4))
    ends = [{"prompt": end["prompt"]} for end in ends]
    tuning = personal.Tuning("adam", 1e-3, 3, "prompt", interpolation=(0.0, 0.25), averaging=True)
    models = {key: params for *key, params in personal.models_on_the_way(start, ends, tuning) for key in [tuple(key)]}
    assert models.keys() == {(e, s, a) for e in range(4) for s, a in ((0, False), (0.25, False), (1, False), (1, True))}
    for epoch in range(4):
        assert models[epoch, 0, False] is start
        assert torch.equal(models[epoch, 1, False]["prompt"], ends[epoch - 1]["prompt"] if epoch else start["prompt"])
        assert all(models[epoch, share, False]["head.1.bias"] is start["head.1.bias"] for share in (0, 0.25, 1))
    quarter = 0.75 * start["prompt"] + 0.25 * ends[2]["prompt"]
    torch.testing.assert_close(models[3, 0.25, False]["prompt"], quarter)
    assert torch.equal(models[1, 1, True]["prompt"], ends[0]["prompt"])
    mean = sum(end["prompt"] for end in ends) / 3
    torch.testing.assert_close(models[3, 1, True]["prompt"], mean)


def test_the_mean_of_one_epoch_is_that_epoch(fedavg, tuned):
    rows = tuned(fedavg, "personalize.lr=0.01", "personalize.epochs=2", "personalize.averaging=true")
    averaged, plain = (
        r.set_index(["client", "epoch"])[["personal_loss", "robust_loss"]] for r in (rows[rows.averaged], own(rows))
    )
    for epoch, equal in ((0, True), (1, True), (2, False)):
        assert averaged.xs(epoch, level="epoch").equals(plain.xs(epoch, level="epoch")) == equal


def test_a_strong_pull_keeps_what_was_sent(fedavg, tuned, updates):
    moved = {}
    for pull in (0, 10, 100):  # at 100 every step begins anew from what was sent
        tuned(fedavg, *SHORT, "personalize.epochs=3", "personalize.optimizer=sgd", f"personalize.pull={pull}")
        start = sent(fedavg)
        moved[pull] = [(update.params["prompt"] - start[c]["prompt"]).norm() for c, update in updates.items()]
    for free, pulled, held in zip(*moved.values()):
        assert free > 1.2 * pulled > 1.2 * 3 * held > 0


def test_a_client_without_test_data_of_its_own_counts_for_robustness_alone(fedavg, tmp_path):
    plan = planned(fedavg, SHORT, tmp_path / "out")
    data = divided_data(plan.config)
    data = replace(data, local_tests=(np.array([], dtype=np.int64), *data.local_tests[1:]))
    result = personalize(plan, data, InProcessPool(plan.config, data), say=print)
    rows = rows_of(tmp_path / "out")
    assert rows.personal_accuracy.isna().equals(rows.client == 0)
    assert rows.robust_accuracy.notna().all()
    assert result["start"]["personal_accuracy"] == pytest.approx(rows[rows.epoch == 0].personal_accuracy.mean())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_epochs_one_by_one_are_one_long_training_bit_for_bit(fedavg, tuned, updates, optimizer):
    how = (*SHORT, "runtime.group_size=1", "personalize.pull=0.5", f"personalize.optimizer={optimizer}")
    long = tuned(fedavg, *how, "personalize.epochs=3")
    whole = dict(updates)
    assert all(same(update.epochs[-1], {"prompt": update.params["prompt"]}) for update in whole.values())
    for epochs in (1, 2):
        short = tuned(fedavg, *how, f"personalize.epochs={epochs}")
        for client, update in updates.items():
            assert len(whole[client].epochs) == 3
            assert torch.equal(update.params["prompt"], whole[client].epochs[epochs - 1]["prompt"])
        pd.testing.assert_frame_equal(short, long[long.epoch <= epochs].reset_index(drop=True))


@pytest.mark.parametrize("trains", ["prompt", "prompt+head", "head"])
def test_only_what_is_asked_for_is_tuned(fedavg, tuned, updates, trains):
    tuned(fedavg, *SHORT, f"personalize.trains={trains}", "personalize.clients=2")
    assert updates.keys() == {0, 1}
    for client, update in updates.items():
        moved = {name for name, value in update.params.items() if not torch.equal(value, sent(fedavg)[client][name])}
        assert {name.split(".")[0] for name in moved} == set(trains.split("+"))


def test_the_number_of_workers_changes_nothing(fedavg, tuned):
    one, three = (tuned(fedavg, *SHORT, f"runtime.workers={workers}") for workers in (1, 3))
    pd.testing.assert_frame_equal(one, three, check_exact=True)


@pytest.mark.ray
def test_on_ray_the_numbers_are_the_same(small_cluster, fedavg, tuned, cli, tmp_path):
    for name, *overrides in (("kept",), ("sent", "runtime.cache_mb=0")):  # the tokens, or images in every step
        code, shown, errors = cli(
            "personalize", fedavg, *SHORT, *overrides, "runtime.workers=1", "--output", tmp_path / name
        )
        assert code == 0, errors
        assert "lr 0.01: " in shown
        pd.testing.assert_frame_equal(rows_of(tmp_path / name), tuned(fedavg, *SHORT, *overrides), check_exact=True)


def test_a_run_leaves_its_settings_rows_curve_figure_and_result(fedavg, cli, tmp_path):
    how = ("personalize.lr=[0.003,0.03]", "personalize.averaging=true")
    code, shown, errors = cli("personalize", fedavg, *how, "--output", tmp_path / "out", "--local")
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("personalize.yaml", "personalize.csv", "curve.csv", "curve.png", "result.json")
    }
    saved = yaml.safe_load((tmp_path / "out" / "personalize.yaml").read_text())
    assert saved["round"] == 2
    assert saved["personalize"].items() >= {"lr": [0.003, 0.03], "trains": "prompt", "epochs": 5, "pull": 0.0}.items()
    rows, curve = rows_of(tmp_path / "out"), pd.read_csv(tmp_path / "out" / "curve.csv")
    assert len(rows) == 6 * 2 * 6 * 3
    assert not rows.duplicated(MODEL).any()
    point = curve.iloc[-1]
    of_point = rows[np.logical_and.reduce([rows[key] == point[key] for key in trade_off.MODEL])]
    assert (point.clients, len(of_point)) == (6, 6)
    assert point.robust_accuracy == pytest.approx(of_point.robust_accuracy.mean())
    assert point.personal_accuracy_error == pytest.approx(of_point.personal_accuracy.std(ddof=1) / 6**0.5)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [rate["lr"] for rate in result["rates"]] == [0.003, 0.03]
    assert result["most_personal"]["personal_accuracy"] == own(curve).personal_accuracy.max()
    assert 0 < result["interpolated"]["lambda"] < 1
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("lr")] == ["lr 0.003", "lr 0.03"]
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_interrupted_goes_on_with_the_rates_that_are_left(fedavg, cli, tmp_path):
    how = ("personalize.lr=[0.01,0.02]", "personalize.epochs=1")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli("personalize", fedavg, *how, "--output", whole, "--local")[0] == 0

    def interrupt(line):
        if line.startswith("lr"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planned(fedavg, how, parts), local=True, say=interrupt)
    done = rows_of(parts)
    assert set(done.lr) == {0.01}
    done.assign(personal_loss=7.0).to_csv(parts / "personalize.csv", index=False)  # to see that it is not done again
    code, _, errors = cli("personalize", fedavg, "--output", parts, "--resume", "--local")
    assert code == 0, errors
    after, expected = rows_of(parts), rows_of(whole)
    assert set(after[after.lr == 0.01].personal_loss) == {7.0}
    pd.testing.assert_frame_equal(after.drop(columns="personal_loss"), expected.drop(columns="personal_loss"))
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "curve.csv") for folder in (parts, whole)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["personalize.lr=-1"], ["personalize.lr", "-1", "greater than 0"]),
        (["personalize.lr=[]"], ["personalize.lr"]),
        (["personalize.lr=[0.1,0.1]"], ["personalize.lr", "every number once"]),
        (["personalize.lr=fast"], ["personalize.lr", "'fast'", "a number"]),
        (["personalize.interpolation=1.5"], ["personalize.interpolation", "1.5", "less than or equal to 1"]),
        (["personalize.interpolation=[0.5,-0.1]"], ["personalize.interpolation", "-0.1"]),
        (["personalize.epochs=-1"], ["personalize.epochs", "-1"]),
        (["personalize.optimizer=adamm"], ["personalize.optimizer", "did you mean 'adam'?"]),
        (["personalize.trains=all"], ["personalize.trains", "'all'", "'prompt+head'"]),
        (["personalize.averaging=7"], ["personalize.averaging", "true or false"]),
        (["personalize.clients=7"], ["personalize.clients: 7", "1 to 6"]),
        (["personalize.epoch=3"], ["personalize.epoch", "did you mean 'epochs'?"]),
        (["personalize=3"], ["personalize", "keys below it"]),
        (["local.lr=3"], ["local.lr=3", "keys of personalize and runtime"]),
        (["runtime.worker=3"], ["runtime.worker", "did you mean 'workers'?"]),
        (["epochs"], ["'epochs'", "key.path=value"]),
        (["--resume"], ["--resume: no personalization in", "personalize.yaml is missing"]),
        (["--resume", "personalize.lr=1"], ["personalize.lr=1: cannot be given here", "keys of runtime"]),
    ],
)
def test_bad_input_is_one_line_with_code_2(fedavg, cli, tmp_path, arguments, named):
    code, _, errors = cli("personalize", fedavg, *arguments, "--output", tmp_path / "out", "--local")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert "Traceback" not in errors
    for part in named:
        assert part in errors
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_personalized_that_is_said_in_one_line(fedavg, cli, tmp_path):
    empty, begun, used = tmp_path / "empty", tmp_path / "begun", tmp_path / "used"
    for folder in (empty, begun, used):
        folder.mkdir()
    (begun / "config.yaml").write_text((fedavg / "config.yaml").read_text())
    (used / "notes.txt").touch()
    for arguments, line in (
        ([tmp_path / "nowhere"], "nowhere: no run in it (config.yaml is missing)"),
        ([empty], "empty: no run in it (config.yaml is missing)"),
        ([begun], "begun: the run has no checkpoint yet"),
        ([fedavg, "--output", used], "is not an empty folder; allowed: --resume, or another folder"),
        ([], "RUN_DIR"),
    ):
        code, _, errors = cli("personalize", *arguments, "--local")
        assert (code, errors.count("\n")) == (2, 1)
        assert line in errors


def test_prompts_cannot_be_tuned_where_there_are_none(tmp_path, cli):
    folder = federated(tmp_path / "run", "algorithm.name=head")
    code, _, errors = cli("personalize", folder, "personalize.trains=prompt", "--local")
    assert (code, errors.count("\n")) == (2, 1)
    assert "personalize.trains: 'prompt', but prompt.kind = 'none' has no prompts; allowed: head" in errors


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: "", "not a table of lr, epoch, lambda"),
        (lambda text: text.replace("robust_accuracy", "robust"), "not a table of lr, epoch, lambda"),
        (lambda text: text.replace("0.01", "fast"), "not a table of lr, epoch, lambda"),
        (lambda text: text.splitlines()[0] + "\n0,,0.01,,,,,,,\n", "found an empty cell"),
    ],
)
def test_damaged_rows_are_told_in_one_line_and_stay_as_they_are(fedavg, cli, tmp_path, damage, told):
    out = tmp_path / "out"
    assert cli("personalize", fedavg, "personalize.lr=0.01", "personalize.epochs=0", "--output", out, "--local")[0] == 0
    rows = out / "personalize.csv"
    rows.write_text(damage(rows.read_text()))
    before = rows.read_bytes()
    code, _, errors = cli("personalize", fedavg, "--output", out, "--resume", "--local")
    assert (code, errors.count("\n")) == (2, 1), errors
    assert told in errors
    assert rows.read_bytes() == before
