"""README and the pages in docs/ are run: their commands on a tiny model, their Python as it stands."""

import json
import re
import shlex

import numpy as np
import pytest
from pages import PAGES, ROOT
from PIL import Image
from tiny import TINY_MODEL

from fedprompt.algorithms import registry
from fedprompt.cli import main
from fedprompt.programs import PROGRAMS
from fedprompt.sweeps.space import expand
from fedprompt.sweeps.sweep_file import read

TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
ONE_ROUND = [*TINY_MODEL, "federation.rounds=1"]


def blocks(language, about=""):
    """Blocks of a language on all pages, or only those that hold a word."""
    return [code for code in re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL) if about in code]


def commands():
    """Lines of all pages, each once, however often it is there."""
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("fedprompt")))


def shown(name):
    """The one command, outside the blocks that are run, in which a word occurs."""
    (line,) = {line for line in re.findall(r"^\$ (fedprompt .*)$", TEXT, flags=re.MULTILINE) if name in line}
    return line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the images that the pages speak of, and the sweep files, of one value per key."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name in ("cat", "dog"):
            place = tmp_path / "photos" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (tmp_path / "tune_configs").mkdir()
    for file in (ROOT / "tune_configs").glob("*.yaml"):
        short = re.sub(r"{grid: \[([^,\]]*)[^\]]*\]}", r"{grid: [\1]}", file.read_text("utf-8"))
        (tmp_path / "tune_configs" / file.name).write_text(short, "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, *more):
    """Run a command in this process; one that ends with an exit code raises SystemExit and so fails the test."""
    main.main([*shlex.split(line)[1:], *more])


def test_every_command_of_a_page_works(folder):
    assert len(commands()) >= 10
    for line in commands():
        if line.startswith(("fedprompt predict", "fedprompt export")):
            continue  # tests/api/test_python_page.py: they need the page's run
        if line.startswith("fedprompt sweep"):
            run(line, *([] if "--resume" in line else [*ONE_ROUND, "data.limit=500", "tracking.tensorboard=false"]))
        elif line.startswith("fedprompt personalize"):
            run(line, "--local", *([] if "--resume" in line else ["personalize.clients=3"]))
        elif "--resume" in line:
            run(line, "federation.rounds=2", "--local")
        elif line.startswith("fedprompt run"):
            local = () if "--local" in line else ("--local",)
            limit = () if "folder" in line else ("data.limit=500",)
            run(line, *ONE_ROUND, *limit, *local)
        else:
            run(line)
    assert len(list((folder / "runs").glob("*/result.json"))) >= 5


def test_the_sweep_file_that_is_shown_is_one(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "sweep.yaml").write_text(text)
    trials = expand(read(tmp_path / "sweep.yaml"))
    assert len(trials) == 2 * 3 * 2 + 2 * 3 * 2  # FedProx has two draws of mu at every point
    assert {"algorithm.mu" in trial.swept for trial in trials} == {True, False}


def define(code, name="page"):
    exec(compile(code, name, "exec"), {"__name__": name})


def test_the_method_that_is_shown_runs(folder, registries):
    (code,) = blocks("python", about="fedmedian")
    define(code)
    assert code.count("\n") <= 30
    run("fedprompt run algorithm.name=fedmedian --output runs/median --local", *ONE_ROUND, "data.limit=500")
    assert (folder / "runs/median/result.json").exists()


def test_the_rule_that_is_shown_clips_gradients(folder, registries):
    (code,) = blocks("python", about="fedclip")
    define(code)
    losses = {}
    for name, settings in {"clipped": ["algorithm.clip=1e-9"], "default": []}.items():
        line = f"fedprompt run algorithm.name=fedclip --output runs/{name} --local"
        run(line, *ONE_ROUND, "data.limit=500", *settings)
        rounds = [json.loads(row) for row in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["test"]["loss"] for row in rounds if "test" in row]
    assert losses["clipped"][0] == pytest.approx(losses["clipped"][-1], abs=1e-5)  # nothing moves
    assert losses["default"][0] != pytest.approx(losses["default"][-1], abs=1e-5)


def test_the_loader_that_is_shown_loads(folder, registries):
    (code,) = blocks("python", about="numpy.savez")
    define(code)
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 400), ("test", 50)):
        images, labels = rng.integers(0, 255, (count, 20, 20), dtype=np.uint8), np.arange(count) % 4
        np.savez(folder / "pictures" / f"{part}.npz", images=images, labels=labels)
    run(shown("data.name=arrays"), *ONE_ROUND, "--output", "runs/arrays", "--local")
    assert json.loads((folder / "runs/arrays/result.json").read_text())["dataset"] == "arrays"


def test_the_backbone_that_is_shown_runs(folder):
    (code,) = blocks("python", about="vit_tiny")
    define(code)
    tiny = ["data.limit=200", "federation.clients=4", "federation.cohort=1", "federation.rounds=1", "local.epochs=1"]
    run(shown("vit_tiny"), *tiny, "partition.min_size=4", "prompt.kind=none", "algorithm.name=head", "--local")
    (result,) = (folder / "runs").glob("*/result.json")
    assert "vit_tiny" in json.dumps(json.loads(result.read_text())["backbone"])


def test_methods_and_benchmarks_that_exist_are_on_a_page():
    readme, methods = (ROOT / "README.md").read_text("utf-8"), (ROOT / "docs/methods.md").read_text("utf-8")
    sections = re.findall(r"^#.*$", methods, flags=re.MULTILINE)
    sections = {word for line in sections for word in line.lower().split()}
    for method in registry.available():
        assert f"| `{method.name}` |" in readme
        assert method.name in sections or f"| `{method.name}` |" in methods
    for command in PROGRAMS.values():
        assert command in TEXT


def test_the_settings_of_every_method_are_on_the_page_about_methods():
    page = (ROOT / "docs/methods.md").read_text("utf-8")
    for method in registry.available():
        for name in method.Settings.model_fields:
            assert f"`{name}`" in page or f"`algorithm.{name}`" in page, f"{method.name}: {name}"
