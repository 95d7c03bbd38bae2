"""Every type of plugin: the examples of docs/extending.md, packaged, installed and used from the command line."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY

from fedprompt import registry
from fedprompt.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-package"
version = "1.0"

"""
PIP = [
    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
    "--disable-pip-version-check",
]
NAMES = {
    **{"algorithms": "fedmedian", "local_rules": "adamw", "kinds": "low-rank", "heads": "cosine"},
    **{"partitions": "halves", "datasets": "arrays", "backbones": "small-vit", "trackers": "csv"},
}
ALL = [
    *("algorithm.name=fedmedian", "local.optimizer=adamw", "prompt.kind=low-rank", "head.kind=cosine"),
    *("partition.kind=halves", "data.name=arrays", "data.root=pictures"),
    *("backbone.name=small-vit", "backbone.weights=random", "tracking.trackers=[csv]"),
]


def entries():
    """What the page names under the entry points: {type: (name, module)}."""
    found = re.findall(r'\[project\.entry-points\."fedprompt\.(\w+)"\]\n([\w-]+) = "my_package\.(\w+)"', PAGE)
    return {type: (name, module) for type, name, module in found}


def example(type, name):
    """The one block of Python that registers a name of a type."""
    decorator = f"@{type.removesuffix('s')}("
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (code,) = [code for code in blocks if re.search(re.escape(decorator) + rf'\s*"{name}"', code)]
    return code


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed a package of all examples."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "my_package").mkdir()
    (source / "my_package" / "__init__.py").touch()
    for type, (name, module) in entries().items():
        (source / "my_package" / f"{module}.py").write_text(example(type, name), encoding="utf-8")
    toml = "\n".join(re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL))
    (source / "pyproject.toml").write_text(PROJECT + toml, encoding="utf-8")
    pip = subprocess.run([*PIP, "--target", target, source], capture_output=True, text=True, check=False)
    assert pip.returncode == 0, pip.stderr
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with the files of the data set that the page speaks of."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 600), ("test", 40)):
        images, labels = rng.integers(0, 255, (count, 20, 20), dtype=np.uint8), np.arange(count) % 4
        np.savez(folder / "pictures" / f"{part}.npz", images=images, labels=labels)
    return folder


@pytest.fixture
def here(installed, place, monkeypatch, registries):
    """The package is installed where this process looks, and nothing of it is loaded yet."""
    monkeypatch.syspath_prepend(installed)
    monkeypatch.chdir(place)
    monkeypatch.setattr(registry, "_PLUGINS", registry._Plugins())
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def command(place, installed, *arguments):
    """Call the command line in a process of its own."""
    more = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(more)}
    line = [sys.executable, "-m", "fedprompt", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=place, env=environment, check=False)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def test_the_page_has_one_complete_example_of_every_type():
    assert {type: name for type, (name, _) in entries().items()} == NAMES
    assert registry.TYPES.keys() == NAMES.keys()


@pytest.mark.parametrize("type", NAMES)
def test_the_installed_example_is_listed(here, capsys, type):
    main.main(["list", type.replace("_", "-")], standalone_mode=False)
    listed = capsys.readouterr()
    assert NAMES[type] in [line.split()[0] for line in listed.out.splitlines()]
    assert listed.err == ""


@pytest.mark.parametrize("type", NAMES)
def test_the_command_that_is_shown_runs(here, type):
    (line,) = [line for line in re.findall(r"^\$ (fedprompt run .*)$", PAGE, re.MULTILINE) if NAMES[type] in line]
    more = ["federation.rounds=1", *shlex.split(line)[2:], "--local", "--output", f"runs/{type}"]
    main.main(["run", *TINY, *more], standalone_mode=False)
    assert result_of(here / "runs" / type)["rounds"] == 1


def test_all_examples_together_run_in_a_process_of_their_own(place, installed):
    ended = command(place, installed, "run", *TINY, *ALL, "--local", "--output", "here")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (result_of(place / "here")["algorithm"], result_of(place / "here")["dataset"]) == ("fedmedian", "arrays")
    assert [row.split(",")[0] for row in (place / "here" / "accuracy.csv").read_text().split()] == ["0", "1", "2"]


@pytest.mark.ray
def test_all_examples_together_run_on_ray(place, installed):
    ended = command(place, installed, "run", *TINY, *ALL, "runtime.workers=2", "--output", "there")
    assert ended.returncode == 0, ended.stderr
    assert len((place / "there" / "accuracy.csv").read_text().split()) == 3
    assert result_of(place / "there")["algorithm"] == "fedmedian"


@pytest.mark.parametrize("type", [type for type in NAMES if type != "backbones"])
def test_where_the_package_is_not_installed_its_names_are_unknown(place, monkeypatch, type):
    monkeypatch.chdir(place)
    (given,) = [key for key in ALL if NAMES[type] in key]
    with pytest.raises(SystemExit) as end:
        main.main(["run", *TINY, given, "--local", "--output", "nowhere"], standalone_mode=False)
    assert end.value.code == 2
    assert not (place / "nowhere").exists()
