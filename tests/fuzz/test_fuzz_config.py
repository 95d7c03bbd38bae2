"""Random configurations and sweep files are read or refused in one line; what is read survives being written."""

import functools
import typing

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import judged

from fedprompt.algorithms import registry
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.sweeps import sweep_file
from fedprompt.sweeps.space import expand

# Texts that have meanings to YAML, numbers to Python, names to pydantic, paths or links to a file system.
ODD_TEXTS = [
    *("", " ", "null", "~", "true", "yes", "off", "5", "-1", "0", "-0.0", "1e-4", "1e400", ".inf", "-.inf", ".nan"),
    *("1e-300", "1e308", "0x10", "0o17", "1_000", "1:30", "2020-13-45", "2020-01-01", "9" * 5000, "1" + "0" * 30),
    *("[]", "{}", "[1, 2", "[0.9]", "[0.9, .nan]", "{a: 1}", "{a: 1, a: 2}", "a: b", "- 1", "# comment", "photos #2"),
    *("!!float ''", "!!bool x", "!!int x", "!!timestamp x", "!!binary x", "!!set x", "!!python/name:os.system"),
    *("&a [*a]", "*a", "<<: 1", "---", "...", "%YAML 3", "'", '"', "\\", "|", ">", "@", "`"),
    *("\t", "\n", "\x00", "\x1b"),
    *("[" * 3000, "{a: " * 500, "~nosuchuser/x", "~/x", "/dev/null/x", "x" * 5000, "s3://", "github://a", "memory://x"),
    *("\ud800", "é", "𝄞", "\u202e", "\ufeff", "adam", "pfpt", "digits", "float32"),
]
NAMES = ["model_fields", "model_config", "model_extra", "__class__", "copy", "name", "settings", "lr", "a.b", "", "\n"]


@functools.cache
def known_keys() -> list[str]:
    """Every dotted key of a configuration, and every method's own."""
    tree = Config().model_dump()
    sections = [f"{section}.{key}" for section, keys in tree.items() if isinstance(keys, dict) for key in keys]
    own = [f"algorithm.{key}" for method in registry.available() for key in method.Settings.model_fields]
    return ["seed", *sections, *dict.fromkeys(own)]


def keys() -> st.SearchStrategy[str]:
    """Mostly keys that there are; some that there are not."""
    there = st.sampled_from(known_keys())
    near = st.builds(lambda key, name: f"{key.partition('.')[0]}.{name}", there, st.sampled_from(NAMES))
    return st.one_of(there, there, there, near, st.sampled_from(NAMES), st.text(max_size=8))


def texts() -> st.SearchStrategy[str]:
    """Values as somebody types them."""
    numbers = st.one_of(st.integers(), st.floats(), st.integers(-(10**25), 10**25)).map(repr)
    methods = st.sampled_from([method.name for method in registry.available()])
    return st.one_of(st.sampled_from(ODD_TEXTS), numbers, methods, st.text(max_size=20))


def values() -> st.SearchStrategy[typing.Any]:
    """Values as a program has them."""
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(ODD_TEXTS), st.text(max_size=8)
    )
    names = st.one_of(st.sampled_from(NAMES), st.sampled_from([key.rpartition(".")[2] for key in known_keys()]))
    inner = st.recursive(
        leaf, lambda below: st.lists(below, max_size=3) | st.dictionaries(names, below, max_size=3), max_leaves=6
    )
    return leaf | inner


def read_again(config: Config, folder) -> Config:
    """A configuration as it comes back from its file."""
    path = folder / "written.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return load(path)


@given(overrides=st.lists(st.builds("{}={}".format, keys(), texts()), min_size=1, max_size=3))
def test_overrides_are_read_or_refused_in_one_line(overrides, tmp_path_factory):
    config = judged(lambda: load(None, overrides))
    if config is not None:
        assert read_again(config, tmp_path_factory.getbasetemp()) == config


@given(
    tree=st.dictionaries(
        st.sampled_from([*Config.model_fields, *NAMES]),
        st.dictionaries(st.one_of(keys(), st.text()), values()) | values(),
    )
)
def test_a_file_of_odd_values_is_read_or_refused_in_one_line(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    config = judged(lambda: load(path))
    if config is not None:
        assert read_again(config, path.parent) == config


def odd_files() -> st.SearchStrategy[bytes]:
    """Contents of files: random bytes, or lines of odd texts."""
    lines = st.lists(st.sampled_from(ODD_TEXTS), max_size=6)
    return st.binary() | lines.map(lambda found: "\n".join(found).encode("utf-8", "surrogatepass"))


@given(content=odd_files())
def test_a_file_of_odd_text_is_read_or_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(content)
    judged(lambda: load(path))


@settings(max_examples=settings().max_examples // 3)
@given(
    space=st.dictionaries(
        keys(),
        st.dictionaries(st.sampled_from(["grid", "choice", "uniform", "loguniform", "randint", "x"]), values()),
        max_size=3,
    ),
    others=st.dictionaries(st.sampled_from([*sweep_file.SweepFile.model_fields, "x"]), values(), max_size=2),
)
def test_a_sweep_file_is_expanded_or_refused_in_one_line(space, others, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_text(yaml.safe_dump({"space": space, **others}), encoding="utf-8", errors="surrogatepass")
    judged(lambda: list(expand(sweep_file.read(path))))
