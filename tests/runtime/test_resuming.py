"""A checkpoint is used only with what it was made with: configuration, data, files, and a state that fits the model."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from commands import cli
from PIL import Image
from tiny import TINY_MODEL

from fedprompt.config.parsing import from_dict, load
from fedprompt.errors import InputError
from fedprompt.runtime.checkpoints.resuming import start_of
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import new_run, run_in_process

FAST = ("algorithm.name=fedavg", "federation.rounds=2", "data.limit=200")


def begin(runs, name, *overrides):
    with new_run(runs.folder / name, runs.config(*overrides), overwrite=False):
        return runs.local(name, *overrides)


def resume(runs, name, *overrides):
    return cli("run", "--resume", "--local", "--output", runs.folder / name, *overrides)


def one_line(capsys):
    told = capsys.readouterr().err
    assert told.count("\n") == 1, told
    return told


@pytest.fixture(scope="module")
def made(shared_runs):
    """A finished run, not to be changed."""
    begin(shared_runs, "made", *FAST)
    return shared_runs.folder / "made"


@pytest.fixture
def copy(made, runs):
    """A copy of it."""
    return shutil.copytree(made, runs.folder / "run")


# --- configuration

EDITS = [
    ("seed", 1),
    ("data.name", "fashion-mnist-small"),
    ("data.limit", 300),
    ("data.validation", 0.2),
    ("partition.kind", "iid"),
    ("partition.alpha", 1.0),
    ("partition.min_size", 5),
    ("backbone.image_size", 48),
    ("backbone.crop", 0.9),
    ("backbone.name", "vit_tiny_patch16_224"),
    ("prompt.length", 3),
    ("prompt.layer", 1),
    ("prompt.pool_size", 7),
    ("prompt.kind", "pool"),
    ("head.hidden", 64),
    ("head.dropout", 0.1),
    ("head.personal", True),
    ("head.kind", "linear"),
    ("local.optimizer", "sgd"),
    ("local.lr", 0.01),
    ("local.prompt_lr", 0.01),
    ("local.epochs", 3),
    ("local.batch_size", 8),
    ("local.betas", [0.8, 0.9]),
    ("blackbox.draws", 2),
    ("algorithm.name", "frozen"),
    ("federation.clients", 5),
    ("federation.cohort", 2),
    ("federation.eval_every", 2),
    ("federation.dropout", 0.1),
    ("federation.max_lost", 0.1),
    ("federation.rounds", 1),
]


@pytest.mark.parametrize(("key", "value"), EDITS, ids=[key for key, _ in EDITS])
def test_a_configuration_that_was_edited_after_the_run_is_refused_by_its_key(made, key, value):
    tree = yaml.safe_load((made / "config.yaml").read_text())
    section, _, name = key.rpartition(".")
    (tree[section] if section else tree)[name] = value
    with pytest.raises(InputError, match=f"^{key}: found ") as caught:
        start_of(from_dict(tree), made)
    assert "\n" not in str(caught.value)
    if key != "federation.rounds":
        assert "round_000002.pt was made with" in str(caught.value)
        assert "may change: federation.rounds" in str(caught.value)


def test_settings_of_a_method_are_compared_too(runs):
    begin(runs, "run", "algorithm.name=fedprox", "algorithm.mu=0.1", "federation.rounds=1", "data.limit=200")
    config = runs.config("algorithm.name=fedprox", "algorithm.mu=0.2", "federation.rounds=1", "data.limit=200")
    with pytest.raises(InputError, match=r"^algorithm\.mu: found 0\.2, but .* was made with 0\.1; "):
        start_of(config, runs.folder / "run")


def test_the_command_refuses_an_edited_file_before_it_computes_anything(copy, runs, capsys, monkeypatch):
    monkeypatch.setattr("fedprompt.runtime.run.build_data", None)
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    edited = path.read_text()
    assert resume(runs, "run") == 2
    assert one_line(capsys).startswith("fedprompt: seed: found 1, but ")
    assert path.read_text() == edited


@pytest.mark.parametrize(
    "override",
    ["federation.rounds=3", "federation.max_lost=0.9", "runtime.checkpoint_every=5", "tracking.tensorboard=true"],
)
def test_what_may_change_does(made, runs, override):
    tree = yaml.safe_load((made / "config.yaml").read_text())
    start_of(load(made / "config.yaml", [override]), made)
    assert tree != yaml.safe_load(load(made / "config.yaml", [override]).to_yaml())


def rewritten(folder, change, round=2):
    """Change what a checkpoint holds, and leave a file whose checksums are right."""
    path = folder / "checkpoints" / f"round_{round:06d}.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_a_key_that_the_checkpoint_does_not_know_has_its_default(copy):
    def forget(content):
        for section, key in (("local", "rho"), ("federation", "dropout"), ("runtime", "precision")):
            del content["origin"]["config"][section][key]

    rewritten(copy, forget)
    assert start_of(load(copy / "config.yaml"), copy).found.round == 2
    with pytest.raises(InputError, match=r"^federation\.dropout: found 0\.2, but .* was made with 0\.0"):
        start_of(load(copy / "config.yaml", ["federation.dropout=0.2"]), copy)


def test_a_key_that_this_version_does_not_know_is_named(copy):
    rewritten(copy, lambda content: content["origin"]["config"]["local"].update(magic=1))
    with pytest.raises(InputError, match=r"round_000002\.pt: its configuration cannot be read here \(local\.magic"):
        start_of(load(copy / "config.yaml"), copy)


def test_a_checkpoint_of_the_first_version_resumes_and_says_what_was_not_checked(copy, runs, capsys):
    def as_first(content):
        for part in ("origin", "best", "first_line", "contents"):
            del content[part]

    for round in (1, 2):
        rewritten(copy, as_first, round)
    (copy / "checkpoints" / "best.pt").unlink()
    best = json.loads((copy / "result.json").read_text())["best"]
    assert resume(runs, "run", "federation.rounds=3") == 0
    assert "of an earlier version" in capsys.readouterr().err
    now = json.loads((copy / "result.json").read_text())["best"]
    assert now["validation_accuracy"] >= best["validation_accuracy"]


# --- the state


def drop(content, *path):
    for part in path[:-1]:
        content = content[part]
    del content[path[-1]]


def put(content, value, *path):
    for part in path[:-1]:
        content = content[part]
    content[path[-1]] = value


PARAMS = ("state", "params")
DAMAGE = {
    "another shape": lambda c: put(c, c["state"]["params"]["prompt"][:, :-1].clone(), *PARAMS, "prompt"),
    "fewer rows": lambda c: put(c, c["state"]["params"]["prompt"][:-1].clone(), *PARAMS, "prompt"),
    "another type": lambda c: put(c, c["state"]["params"]["prompt"].double(), *PARAMS, "prompt"),
    "a missing tensor": lambda c: drop(c, *PARAMS, "prompt"),
    "another name": lambda c: put(c, c["state"]["params"].pop("prompt"), *PARAMS, "prompts"),
    "too many": lambda c: put(c, torch.zeros(2), *PARAMS, "new"),
    "no tensor": lambda c: put(c, 1.0, *PARAMS, "prompt"),
    "no numbers": lambda c: put(c, torch.full_like(c["state"]["params"]["prompt"], torch.nan), *PARAMS, "prompt"),
    "infinite": lambda c: put(c, torch.full_like(c["state"]["params"]["prompt"], torch.inf), *PARAMS, "prompt"),
    "no params": lambda c: put(c, None, *PARAMS),
    "no memory": lambda c: drop(c, "state", "memory"),
    "no clients": lambda c: drop(c, "state", "clients"),
    "part of a memory": lambda c: drop(c, "state", "memory", "first", "prompt"),
    "a whole memory": lambda c: put(c, {}, "state", "memory"),
    "client of another kind": lambda c: put(c, {"rule.v": torch.zeros(1)}, "state", "clients", "four"),
    "client that is none": lambda c: put(c, {"rule.v": torch.zeros(1)}, "state", "clients", 99),
    "no state": lambda c: put(c, [1], "state"),
    "text for a round": lambda c: put(c, "2", "round"),
    "truth for a round": lambda c: put(c, True, "round"),
    "float for a round": lambda c: put(c, 2.0, "round"),
    "round below zero": lambda c: put(c, -2, "round"),
    "round of another file": lambda c: put(c, 7, "round"),
    "no round": lambda c: drop(c, "round"),
    "totals are a list": lambda c: put(c, [1], "totals"),
    "totals hold text": lambda c: put(c, "much", "totals", "up_bytes"),
    "totals hold no number": lambda c: put(c, float("nan"), "totals", "up_bytes"),
    "no totals": lambda c: drop(c, "totals"),
    "something else": lambda c: put(c, 1, "else"),
    "best round later": lambda c: put(c, 9, "best", "round"),
    "nested without end": lambda c: put(c, c, "state", "memory", "self"),
}


@pytest.fixture(scope="module")
def with_memory(shared_runs):
    """A finished run of a method whose server and clients keep something, not to be changed."""
    begin(shared_runs, "fedopt", "algorithm.name=fedopt", "head.personal=true", "federation.rounds=2", "data.limit=200")
    return shared_runs.folder / "fedopt"


@pytest.mark.parametrize("first_version", [False, True], ids=["", "0.1"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_that_is_not_what_the_run_wrote_is_one_line(with_memory, runs, damage, first_version):
    folder = shutil.copytree(with_memory, runs.folder / "run")

    def change(content):
        if first_version:
            for part in ("origin", "best", "first_line", "contents"):
                del content[part]
        DAMAGE[damage](content)

    if first_version and damage in ("best round later", "something else"):
        pytest.skip("not a part of such a file")
    rewritten(folder, change)
    with pytest.raises(InputError, match=r"round_000002\.pt: .*; allowed: ") as caught:
        list(run_in_process(load(folder / "config.yaml"), folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["a client's head", "a client"])
def test_what_is_missing_of_clients_is_named(with_memory, runs, damage):
    folder = shutil.copytree(with_memory, runs.folder / "run")
    client, store = next(iter(CheckpointStore(str(folder / "checkpoints")).latest().state.clients.items()))
    path = ("state", "clients", client) + ((next(iter(store)),) if damage == "a client's head" else ())
    rewritten(folder, lambda content: drop(content, *path))
    with pytest.raises(InputError, match=rf"state\.clients\.{client}\..* is missing"):
        start_of(load(folder / "config.yaml"), folder)


def test_tensors_that_are_longer_than_their_file_are_refused(copy):
    def swell(content):
        put(content, torch.zeros(1).expand(10**12), "state", "memory", "bomb")
        drop(content, "contents", "state.memory")  # which was empty
        put(content, "float32 [1000000000000]", "contents", "state.memory.bomb")

    rewritten(copy, swell)
    with pytest.raises(InputError, match="has fewer values than that"):
        start_of(load(copy / "config.yaml"), copy)


# --- lines


def edited(folder, change):
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))


def with_value(lines, key, value):
    record = json.loads(lines[1])
    return [lines[0], json.dumps({**record, key: value}).encode(), *lines[2:]]


BAD_LINES = {
    "null": lambda lines: [lines[0], b"null", *lines[2:]],
    "text": lambda lines: [lines[0], b'"round"', *lines[2:]],
    "NaN": lambda lines: with_value(lines, "round", float("nan")),
    "a number beyond floats": lambda lines: with_value(lines, "train", {"loss": 10**400}),
    "NaN inside": lambda lines: with_value(lines, "train", {"loss": float("nan")}),
    "text for a round": lambda lines: with_value(lines, "round", "1"),
    "truth for a round": lambda lines: with_value(lines, "round", True),
    "nested without end": lambda lines: [lines[0], b'{"round": 1, "a": ' + b"[" * 100_000, *lines[2:]],
    "digits without end": lambda lines: [lines[0], b'{"round": ' + b"1" * 5000 + b"}", *lines[2:]],
    "no bytes of a text": lambda lines: [lines[0], b"\xff\xfe", *lines[2:]],
    "scores are a text": lambda lines: with_value(lines, "test", "good"),
    "accuracy is a text": lambda lines: with_value(lines, "test", {"accuracy": "good"}),
    "cohort is null": lambda lines: with_value(lines, "cohort", None),
    "a missing round": lambda lines: [lines[0], lines[2]],
    "a missing first round": lambda lines: lines[1:],
    "a missing last round": lambda lines: lines[:-1],
    "a round twice": lambda lines: with_value([*lines[:2], *lines[1:]], "cohort", [5]),
    "another order": lambda lines: [lines[1], lines[0], lines[2]],
    "a bare round": lambda lines: [lines[0], b'{"round": 1}', lines[2]],
}


@pytest.mark.parametrize("change", BAD_LINES)
def test_lines_that_cannot_be_those_of_the_rounds_so_far_are_one_line(copy, runs, capsys, change):
    edited(copy, BAD_LINES[change])
    before = (copy / "metrics.jsonl").read_bytes()
    assert resume(runs, "run") == 2
    assert "metrics.jsonl" in one_line(capsys)
    assert (copy / "metrics.jsonl").read_bytes() == before


REPAIRED = {
    "later lines": lambda lines: [*lines, lines[2].replace(b'"round": 2', b'"round": 3')],
    "a torn last line": lambda lines: [*lines, lines[2][:50]],
    "the same line twice": lambda lines: [lines[0], lines[1], lines[1], lines[2]],
}


@pytest.mark.parametrize("change", REPAIRED)
def test_lines_that_can_be_repaired_are(copy, runs, change):
    lines = runs.lines("run")
    edited(copy, REPAIRED[change])
    assert resume(runs, "run") == 0
    assert runs.lines("run") == lines


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b'{"best": NaN}', b"[" * 100_000])
def test_a_damaged_result_is_written_anew(copy, runs, content):
    before = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_bytes(content)
    assert resume(runs, "run") == 0
    assert json.loads((copy / "result.json").read_text())["final"] == before["final"]


def test_without_its_lines_a_run_goes_on_and_says_so(copy, runs, capsys):
    best = json.loads((copy / "result.json").read_text())["best"]
    (copy / "metrics.jsonl").unlink()
    assert resume(runs, "run", "federation.rounds=3") == 0
    assert "it tells of the rounds from 3 on" in capsys.readouterr().err
    assert [line["round"] for line in runs.lines("run")] == [3]
    assert resume(runs, "run", "federation.rounds=4") == 0
    now = json.loads((copy / "result.json").read_text())["best"]
    assert now["validation_accuracy"] >= best["validation_accuracy"]


# --- data


def pictures(folder, counts, first=0):
    """A folder of grey pictures, each of its own shade and class."""
    for split in ("train", "test"):
        for label, (name, count) in enumerate(counts.items()):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                shade = np.full((8, 8, 3), (first + 40 * label + i) % 256, dtype=np.uint8)
                Image.fromarray(shade).save(folder / split / name / f"{i:03d}.png")
    return folder


ON_PICTURES = (
    *TINY_MODEL,
    *(
        "algorithm.name=fedavg",
        "data.name=folder",
        "partition.kind=iid",
        "partition.min_size=1",
        "federation.clients=2",
    ),
    *("federation.cohort=2", "federation.rounds=1", "tracking.tensorboard=false", "prompt.layer=0"),
)
COUNTS = {"cat": 12, "dog": 12, "emu": 14}


@pytest.fixture(scope="module")
def on_pictures(tmp_path_factory):
    """A run on a folder of pictures, not to be changed."""
    folder = tmp_path_factory.mktemp("pictures")
    pictures(folder / "data", COUNTS)
    config = load(None, [*ON_PICTURES, f"data.root={folder / 'data'}"])
    with new_run(folder / "run", config, overwrite=False):
        list(run_in_process(config, folder / "run"))
    return folder


def swap(data):
    for split in ("train", "test"):
        (data / split / "cat").rename(data / split / "x")
        (data / split / "dog").rename(data / split / "cat")
        (data / split / "x").rename(data / split / "dog")


def rename(data):
    for split in ("train", "test"):
        (data / split / "cat").rename(data / split / "zebra")


def add(data):
    for split in ("train", "test"):
        shutil.copytree(data / split / "cat", data / split / "fox")


def remove(data):
    for split in ("train", "test"):
        shutil.rmtree(data / split / "emu")


def other_content(data):
    Image.new("RGB", (8, 8), (1, 2, 3)).save(data / "train" / "cat" / "003.png")


def relabel(data):
    (data / "train" / "cat" / "011.png").rename(data / "train" / "dog" / "900.png")


DATA_CHANGES = {
    "labels swapped": (swap, "content of the images"),
    "class renamed": (rename, "without 'cat', with the new 'zebra'"),
    "class added": (add, "with the new 'fox'"),
    "class removed": (remove, "without 'emu'"),
    "image removed": (
        lambda data: (data / "train" / "dog" / "000.png").unlink(),
        "train .*'dog' 12 then, 11 now",
    ),
    "test image removed": (lambda data: (data / "test" / "dog" / "000.png").unlink(), "test split .*'dog' 12 then"),
    "image changed": (other_content, "content of the images in its train split"),
    "image moved": (relabel, "'cat' 12 then, 11 now; 'dog' 12 then, 13 now"),
}


@pytest.mark.parametrize("change", DATA_CHANGES)
def test_data_that_changed_under_a_run_is_refused_and_told(on_pictures, tmp_path, change, monkeypatch):
    monkeypatch.setattr("fedprompt.runtime.run.InProcessPool", None)  # told before the model is built
    alter, told = DATA_CHANGES[change]
    data = shutil.copytree(on_pictures / "data", tmp_path / "data")
    alter(data)
    config = load(on_pictures / "run" / "config.yaml", [f"data.root={data}"])
    with pytest.raises(InputError, match=rf"^data\.root: .*{told}") as caught:
        list(run_in_process(config, on_pictures / "run"))
    assert "\n" not in str(caught.value)


def test_data_may_move_and_the_command_keeps_the_new_place_only_where_it_holds_the_same(on_pictures, tmp_path, capsys):
    folder = shutil.copytree(on_pictures / "run", tmp_path / "run")
    moved, other = shutil.copytree(on_pictures / "data", tmp_path / "moved"), pictures(tmp_path / "other", COUNTS, 9)
    assert cli("run", "--resume", "--local", "--output", folder, f"data.root={moved}", "federation.rounds=2") == 0
    text = (folder / "config.yaml").read_text()
    assert str(moved) in text
    capsys.readouterr()
    assert cli("run", "--resume", "--local", "--output", folder, f"data.root={other}") == 2
    assert f"data.root: the data in '{other}'" in one_line(capsys)
    assert (folder / "config.yaml").read_text() == text


def test_the_result_tells_which_data_it_is_of(on_pictures, made):
    told = json.loads((on_pictures / "run" / "result.json").read_text())["data"]
    assert {name: told[name] for name in ("classes", "domains", "train", "test")} == {
        "classes": 3,
        "domains": 1,
        "train": 38,
        "test": 38,
    }
    assert len(told["digest"]) == 16
    assert told["digest"] != json.loads((made / "result.json").read_text())["data"]["digest"]


def test_a_file_that_the_configuration_names_is_compared_by_its_content(runs, tmp_path):
    path, moved = tmp_path / "names.npy", tmp_path / "moved.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.normal(size=(10, 64)).astype(np.float32))
    overrides = (*FAST[1:], "algorithm.name=fedavg", "prompt.kind=none", "head.kind=mlp")
    begin(runs, "run", *overrides, f"head.embeddings={path}")
    shutil.copy(path, moved)
    assert start_of(runs.config(*overrides, f"head.embeddings={moved}"), runs.folder / "run").found.round == 2
    np.save(path, rng.normal(size=(10, 64)).astype(np.float32))
    with pytest.raises(InputError, match=r"^head\.embeddings: .* holds other content"):
        start_of(runs.config(*overrides, f"head.embeddings={path}"), runs.folder / "run")
