"""Settings that are paths: relative to where the command is given, wherever and however they are used."""

import os
from pathlib import Path

import commands
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import TINY_MODEL

from fedprompt.config.parsing import is_path, load
from fedprompt.errors import InputError
from fedprompt.sweeps.space import expand
from fedprompt.sweeps.sweep_file import read

PATHS = {
    "data.root": "photos",
    "backbone.weights": "w/vit.safetensors",
    "head.embeddings": "e.npy",
    "runtime.storage": "saved",
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder ``here``; gives a function that goes to another one."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda: monkeypatch.chdir(tmp_path / "there")


@pytest.mark.parametrize(("key", "given"), PATHS.items())
def test_a_relative_path_is_absolute_in_the_configuration_and_in_its_file(elsewhere, key, given):
    assert is_path(key)
    here = Path.cwd()
    Path("my.yaml").write_text(yaml.safe_dump({key.split(".")[0]: {key.split(".")[1]: given}}))
    config = load(None, [f"{key}={given}"])
    assert load("my.yaml") == config
    Path("config.yaml").write_text(config.to_yaml())
    elsewhere()
    assert load(here / "config.yaml") == config
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == str(here / given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("../photos", "{above}/photos"),
        ("./photos/", "{here}/photos"),
        ("photos #2", "{here}/photos #2"),
        ("~/photos", "{home}/photos"),
        ("./~photos", "{here}/~photos"),
        ("/data/photos", "/data/photos"),
    ],
)
def test_paths_mean_what_a_shell_means(elsewhere, given, expected):
    names = {"here": Path.cwd(), "above": Path.cwd().parent, "home": Path.home()}
    assert load(None, [f"data.root={given}"]).data.root == expected.format(**names)


def test_the_folder_above_a_link_is_that_of_its_target(elsewhere, tmp_path):
    (tmp_path / "there" / "deep").mkdir()
    Path("link").symlink_to(tmp_path / "there" / "deep")
    assert os.path.realpath(load(None, ["data.root=link/../photos"]).data.root) == str(tmp_path / "there" / "photos")


def test_words_and_uris_are_no_paths():
    config = load(None, ["backbone.weights=random", "runtime.storage=s3://bucket/runs"])
    assert (config.backbone.weights, config.runtime.storage) == ("random", "s3://bucket/runs")
    assert load(None, ["backbone.weights=ofline"]).backbone.weights == "ofline"  # refused later, with a suggestion
    assert not is_path("data.name")
    assert not is_path("nothing")


def test_a_storage_that_is_a_file_uri_is_a_folder(elsewhere):
    assert load(None, ["runtime.storage=file://saved"]).runtime.storage == str(Path.cwd() / "saved")


NO_PATHS = ("''", "~nosuchuser/x.pt", '"a\\0b.pt"', "x" * 300 + "/a.pt", "loop/a.pt")
NO_STORAGE = (*NO_PATHS, "::", "a::b", "s3://", "://a", "simplecache::s3://a/b")


@pytest.mark.parametrize(
    ("key", "given"),
    [(key, given) for key in PATHS for given in (NO_STORAGE if key == "runtime.storage" else NO_PATHS)],
)
def test_what_can_be_no_path_is_refused_in_one_line_that_names_the_key(elsewhere, key, given):
    Path("loop").symlink_to("loop")
    with pytest.raises(InputError) as caught:
        load(None, [f"{key}={given}"])
    assert str(caught.value).startswith(f"{key}: found ")
    assert str(caught.value).isprintable()


def test_a_sweeps_paths_are_absolute_wherever_they_stand_and_in_its_copy(elsewhere):
    here = Path.cwd()
    Path("sweep.yaml").write_text(
        "base: {data: {name: folder}, runtime.storage: saved, backbone: {weights: w/a.pt}}\n"
        "space: {data.root: {grid: [one/photos, two]}}\n"
        "when: [{if: {data.root: two}, space: {backbone.weights: {grid: [b.pt]}}}]\n"
    )
    sweep = read(Path("sweep.yaml"), ["head.embeddings=e.npy"])
    trials = expand(sweep)
    assert [trial.name for trial in trials] == ["000-rootphotos", "001-roottwo-weightsb.pt"]
    assert [trial.config.data.root for trial in trials] == [f"{here}/one/photos", f"{here}/two"]
    assert [trial.config.backbone.weights for trial in trials] == [f"{here}/w/a.pt", f"{here}/b.pt"]
    assert [trial.config.head.embeddings for trial in trials] == [f"{here}/e.npy"] * 2
    assert trials[1].config.runtime.storage == f"{here}/saved/001-roottwo-weightsb.pt"
    Path("copy.yaml").write_text(sweep.to_yaml())
    elsewhere()
    assert read(here / "copy.yaml") == sweep
    assert expand(read(here / "copy.yaml")) == trials


def test_a_path_that_cannot_be_is_named_in_a_sweep(elsewhere):
    Path("sweep.yaml").write_text("space: {data.root: {grid: [a, ~nosuchuser/x]}}")
    with pytest.raises(InputError, match=r"^sweep\.yaml: data\.root: found '~nosuchuser/x'"):
        read(Path("sweep.yaml"))


def test_a_run_on_a_relative_folder_is_resumed_and_personalized_from_another(elsewhere, capsys):
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for name in ("cat", "dog"):
            folder = Path("photos") / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    output = Path.cwd() / "run"
    settings = ["data.name=folder", "data.root=photos", "runtime.storage=saved", "partition.kind=iid"]
    sizes = ["federation.clients=2", "federation.cohort=2", "federation.rounds=1", "partition.min_size=1"]
    given = [*TINY_MODEL, *settings, *sizes, "tracking.tensorboard=false", "algorithm.name=fedavg"]
    assert commands.cli("run", *given, "--output", output, "--local") == 0
    assert list(Path("saved").iterdir())
    elsewhere()
    more = ["run", "--resume", "--output", output, "--local", "federation.rounds=2"]
    assert commands.cli(*more) == 0, capsys.readouterr().err
    assert commands.cli("personalize", output, "--local", "personalize.epochs=0", "personalize.lr=0.1") == 0
    assert not list(Path.cwd().iterdir())
