"""Methods that other packages bring: the example of docs/extending.md, packaged and installed; and broken packages."""

import json
import os
import subprocess
import sys

import pytest
from test_readme import blocks
from tiny import TINY

from fedprompt import registry
from fedprompt.algorithms import registry as methods
from fedprompt.cli import main
from fedprompt.config.parsing import from_dict, load
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which pip has installed a package made of two blocks of that page."""
    (code,), (entry,) = blocks("python", about="fedmedian"), blocks("toml")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    (source / "my_package").mkdir()
    (source / "my_package" / "__init__.py").touch()
    (source / "my_package" / "fedmedian.py").write_text(code, encoding="utf-8")
    (source / "pyproject.toml").write_text(PROJECT + entry, encoding="utf-8")
    pip = subprocess.run([*PIP, "--target", target, source], capture_output=True, text=True, check=False)
    assert pip.returncode == 0, pip.stderr
    return target


@pytest.fixture
def fedprompt(tmp_path):
    """Call the command line in a process of its own, in an empty folder, with more folders to import from."""

    def call(*arguments, path=()):
        more = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(more)}
        command = [sys.executable, "-m", "fedprompt.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    return call


@pytest.fixture
def package(tmp_path, monkeypatch, registries):
    """Make an installed package ``other`` of one module, found as any other is; afterwards methods are as before."""

    def make(code, entry="theirs = other_module"):
        info = tmp_path / "other-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedprompt.algorithms]\n{entry}\n")
        (tmp_path / "other_module.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "_PLUGINS", registry._Plugins())

    yield make
    sys.modules.pop("other_module", None)


DATA_SET = """
from dataclasses import replace
from fedprompt.data import dataset, load

@dataset("theirs", about="a data set of theirs", get="it is here")
def theirs(folder):
    return replace(load("digits"), name="theirs")
"""


def method(name):
    return f"""
from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.algorithms.registry import algorithm

@algorithm("{name}", "a method of theirs")
class Theirs(FedAvg):
    pass
"""


def test_the_installed_method_is_listed(fedprompt, installed):
    ended = fedprompt("algorithms", path=[installed])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "fedmedian" in [line.split()[0] for line in ended.stdout.splitlines()]


def test_the_installed_method_runs(fedprompt, installed, tmp_path):
    ended = fedprompt("run", *TINY, "algorithm.name=fedmedian", "--local", "--output", "median", path=[installed])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads((tmp_path / "median" / "result.json").read_text())["algorithm"] == "fedmedian"


def test_where_the_package_is_not_installed_the_method_is_unknown(fedprompt):
    ended = fedprompt("run", *TINY, "algorithm.name=fedmedian", "--local", "--output", "median")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "algorithm.name: unknown method 'fedmedian'" in ended.stderr


def test_a_package_may_bring_a_data_set_which_a_process_finds_that_read_no_configuration(package, capsys):
    config = from_dict({"federation": {"clients": 4, "cohort": 2}})
    config = config.model_copy(update={"data": config.data.model_copy(update={"name": "theirs"})})
    package(DATA_SET)
    assert build_data(config).name == "theirs"  # as a run's driver on Ray does
    main.main(["datasets"], standalone_mode=False)
    assert "theirs" in [line.split()[0] for line in capsys.readouterr().out.splitlines()]


def test_a_sound_package_is_found_without_a_word(package):
    package(method("theirs"))
    assert methods.get("theirs").__module__ == "other_module"


NO_CLASS = """
from fedprompt.algorithms.registry import algorithm

@algorithm("theirs", "a method of theirs")
def theirs(state, updates):
    pass
"""
NO_AGGREGATE = method("theirs").replace("fedavg import FedAvg", "base import Algorithm as FedAvg")
NO_NAME = "from fedprompt.algorithms.fedavg import FedAvg\nclass Theirs(FedAvg):\n    pass\n"
BROKEN = {
    "no module": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "no such name": ("from fedprompt.algorithms.base import NoSuch", "ImportError: cannot import name 'NoSuch'"),
    "no Python": ("def aggregate(:", "SyntaxError: invalid syntax (other_module.py, line 1)"),
    "raises": (method("theirs") + "raise RuntimeError('one\\ntwo')", "RuntimeError: one two"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "no class": (NO_CLASS, "allowed: a subclass of Algorithm"),
    "no aggregate": (NO_AGGREGATE, "has no aggregate"),
    "empty name": (method(""), "allowed: letters, digits"),
    "several lines": (method("theirs").replace("a method of", "a\\nmethod of"), "allowed: a text of one line"),
    "other kinds": (method("theirs").replace("pass", "kinds = ('text',)"), "has kinds = ('text',)"),
    "taken name": (
        method("fedavg"),
        "'fedavg' is registered twice, by fedprompt.algorithms.fedavg.FedAvg and by other_",
    ),
    "taken data set": (
        DATA_SET.replace('@dataset("theirs"', '@dataset("digits"'),
        "'digits' is registered twice, by fedprompt.data.sources.embedded",
    ),
}
NO_METHODS = {
    "nothing there": ("", "theirs = other_module:theirs", "AttributeError"),
    "a number": ("theirs = 3", "theirs = other_module:theirs", "found 3; allowed: a module, or what @algorithm"),
    "without a name": (NO_NAME, "theirs = other_module:Theirs", "allowed: a module, or what @algorithm"),
    "no entry point": ("", "theirs", "entry points of package 'other' cannot be read"),
}


def assert_told(capsys, error):
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("fedprompt: entry point")
    assert "package 'other'" in line
    assert error in line
    assert "going on without it" in line


@pytest.mark.parametrize("command", ["algorithms", "datasets"])
@pytest.mark.parametrize(("code", "error"), BROKEN.values(), ids=BROKEN)
def test_a_package_that_is_broken_is_named_in_one_line_and_left_out(package, capsys, command, code, error):
    before = registry.snapshot()
    package(code)
    main.main([command], standalone_mode=False)
    assert_told(capsys, error)
    assert before == registry.snapshot()
    load(None, TINY)
    methods.available()
    assert capsys.readouterr().err == ""  # once is enough


@pytest.mark.parametrize(("code", "entry", "error"), NO_METHODS.values(), ids=NO_METHODS)
def test_an_entry_point_that_names_no_method_is_left_out(package, capsys, code, entry, error):
    package(code, entry)
    assert load(None, TINY).algorithm.name == "pfpt"
    assert_told(capsys, error)


def test_a_run_goes_on_beside_a_broken_package(package, capsys, tmp_path):
    package("import no_such_module")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:  # as far as the folder that is a file
        main.main(["run", *TINY, "--local", "--output", str(tmp_path / "file")])
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "no_such_module" in lines[0]
    assert lines[1].startswith("fedprompt: --output")


def test_who_asks_for_the_broken_method_is_told_why_it_is_unknown(package):
    package("import no_such_module")
    with pytest.raises(InputError, match=r"unknown method 'theirs'.*No module named 'no_such_module'") as refused:
        load(None, [*TINY, "algorithm.name=theirs"])
    assert "\n" not in str(refused.value)


def test_workers_say_nothing_of_broken_packages(package, capsys):
    config = load(None, TINY)
    package("import no_such_module")
    build_data(config)
    build_algorithm(config)
    assert capsys.readouterr().err == ""


def test_a_method_or_a_data_set_may_be_named_itself(package, capsys):
    package(method("theirs") + DATA_SET, "theirs = other_module:Theirs\ndata = other_module:theirs")
    assert load(None, [*TINY, "algorithm.name=theirs", "data.name=theirs"]).data.name == "theirs"
    assert capsys.readouterr().err == ""


def test_a_module_that_is_loaded_again_replaces_its_own_method(package):
    package(method("theirs"))
    first = methods.get("theirs")
    exec(method("theirs"), {"__name__": "other_module"})
    assert methods.get("theirs") is not first
