"""Other packages: what they register is found, and a broken one costs itself alone."""

import sys

import pytest
from tiny import TINY

from fedprompt import registry
from fedprompt.algorithms import registry as methods
from fedprompt.cli import main
from fedprompt.config.parsing import from_dict, load
from fedprompt.errors import InputError
from fedprompt.runtime.build import build_algorithm, build_data


@pytest.fixture
def package(tmp_path, monkeypatch, registries):
    """Make an installed package ``other`` of one module, found as any other is; afterwards methods are as before."""

    def make(code, entry="theirs = other_module", type="algorithms", name="other"):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedprompt.{type}]\n{entry}\n")
        (tmp_path / f"{name}_module.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "_PLUGINS", registry._Plugins())

    yield make
    for name in [name for name in sys.modules if name.endswith("_module")]:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


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


SHARED = """
from fedprompt.data.partitions.registry import partition

@partition("shared", "a partition that another package names, too")
def shared(samples, clients, options, rng):
    raise NotImplementedError
"""


def test_a_name_of_any_type_can_be_taken_only_once(package, capsys):
    package(
        "from fedprompt.data.partitions.registry import partition\n@partition('iid', 'mine')\ndef mine(*given): pass\n"
    )
    assert load(None, TINY).partition.kind == "dirichlet"
    assert_told(capsys, "partition.kind: 'iid' is registered twice, by fedprompt.data.partitions.iid.iid and by other_")


def test_what_a_broken_package_imports_of_a_sound_one_stays(package, capsys):
    package("import zsound_module\nimport no_such_module", name="broken", entry="theirs = broken_module")
    package(SHARED, name="zsound", entry="shared = zsound_module", type="partitions")
    assert "shared" in registry.registry_of("partitions").names()
    registry.tell_broken()
    assert "package 'broken'" in capsys.readouterr().err


def test_a_module_may_ask_for_names_while_it_is_loaded(package, capsys):
    package("from fedprompt.algorithms.registry import get\nget('fedavg')\n" + method("theirs"))
    assert methods.get("theirs").name == "theirs"
    registry.tell_broken()
    assert capsys.readouterr().err == ""


def test_a_kind_of_the_same_package_goes_with_its_method(package, capsys):
    kind = """
from fedprompt.models.kinds.prompts import ShallowPrompt
from fedprompt.models.kinds.registry import kind

@kind("mine", "prompts of mine", rates={"adam": (0.25, 0.5)})
class Mine(ShallowPrompt):
    pass
"""
    package(kind + method("theirs").replace("pass", "kinds = ('mine',)"))
    config = load(None, [*TINY, "algorithm.name=theirs"])
    assert (config.prompt.kind, config.local.lr, config.local.prompt_lr) == ("mine", 0.25, 0.5)
    assert capsys.readouterr().err == ""


def test_methods_of_ours_go_with_names_from_outside_that_fit(package):
    rule = """
from fedprompt.client.rules.base import LocalRule
from fedprompt.client.rules.registry import local_rule

@local_rule("blind", "needs no gradients", lr=0.1, prompt_lr=0.1, needs_gradients=False)
class Blind(LocalRule):
    pass

@local_rule("seeing", "needs gradients", lr=0.1, prompt_lr=0.1)
class Seeing(LocalRule):
    pass
"""
    package(rule)
    assert {"blind", "seeing"} <= set(methods.get("fedavg").optimizers)
    assert "blind" in methods.get("fedbbpt").optimizers
    assert "seeing" not in methods.get("fedbbpt").optimizers
    assert load(None, [*TINY, "algorithm.name=fedbbpt", "local.optimizer=blind"]).is_blackbox
    with pytest.raises(InputError, match=r"local\.optimizer: 'blind' does not go with algorithm\.name = 'scaffold'"):
        load(None, [*TINY, "algorithm.name=scaffold", "local.optimizer=blind"])
