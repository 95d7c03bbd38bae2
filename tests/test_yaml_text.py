"""YAML: one text means one thing wherever it stands, and what is no plain data is refused in one line."""

import math

import pytest

from fedprompt.config import yaml_text
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.errors import InputError
from fedprompt.sweeps.sweep_file import read as read_sweep

SCALARS = [
    ("1e-3", 0.001),
    ("5E4", 50000.0),
    ("-.5", -0.5),
    ("010", 10),
    ("0x10", 16),
    ("0o10", 8),
    ("+3", 3),
    (".inf", math.inf),
    ("true", True),
    ("False", False),
    ("null", None),
    ("~", None),
    *((text, text) for text in ("yes", "no", "on", "off", "y", "1:30", "1_000", "2020-01-01", "0b1", "1e", "inf", "=")),
]
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12))]
)


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_a_scalar_means_the_same_in_a_file_an_override_and_a_list(text, value):
    found = [yaml_text.parse(f"key: {text}")["key"], yaml_text.parse_value(text), yaml_text.parse_value(f"[{text}]")[0]]
    assert found == [value] * 3
    assert {type(one) for one in found} == {type(value)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("photos #2", "photos #2"),
        ("a: b", "a: b"),
        ("- a", "- a"),
        ("*a", "*a"),
        ("!!float ''", "!!float ''"),
        ("it's", "it's"),
        (" padded ", "padded"),
        ("a]", "a]"),
        ("[1, 2]", [1, 2]),
        ("{a: 1, b: [yes]}", {"a": 1, "b": ["yes"]}),
        ('"photos #2"', "photos #2"),
        ("'5'", "5"),
        ("''", ""),
    ],
)
def test_an_override_is_a_scalar_unless_it_begins_with_a_bracket_or_a_quote(text, value):
    assert yaml_text.parse_value(text) == value


NO_VALUES = [
    "",
    "\udcff",
    "[1",
    "{a",
    "'a",
    "[1], [2]",
    "[1] #2",
    "'a' #2",
    "'a': b",
    "[1]]",
    "{a: 1, a: 2}",
    "[!!int x]",
]


@pytest.mark.parametrize("text", [*NO_VALUES, "9" * 5000])
def test_an_override_that_is_no_value_is_refused(text):
    with pytest.raises(InputError) as caught:
        load(None, [f"data.root={text}"])
    assert str(caught.value).startswith("data.root: ")
    assert len(str(caught.value)) < 500


REFUSED = {
    **{f"tag {tag}": f"seed: !!{tag} x" for tag in ("float", "bool", "timestamp", "int", "binary", "set", "omap")},
    "empty tagged float": 'seed: !!float ""',
    "tag of a key": "!!float x: 1",
    "own tag": "seed: !mine x",
    "python object": "seed: !!python/object/apply:os.getcwd []",
    "deep flow": "seed: " + "[" * 100_000,
    "deep block": "\n".join(" " * i + "seed:" for i in range(700)),
    "deep list": "- " * 5000,
    "deep aliases": "\n".join(
        ["a0: &a0 [[[[[[[[[[[[[[x]]]]]]]]]]]]]]", *(f"a{i}: &a{i} [[[[[[[*a{i - 1}]]]]]]]" for i in range(1, 9))]
    ),
    "alias bomb": BOMB,
    "cycle": "seed: &a [*a]",
    "cycle of mappings": "seed: &a {b: *a}",
    "unknown alias": "seed: *a",
    "huge number": "seed: " + "9" * 5000,
    "huge hexadecimal": "seed: 0x" + "9" * 5000,
    "duplicate": "seed: 1\nseed: 2",
    "duplicate section": "local: {lr: 1}\nseed: 1\nlocal: {epochs: 2}",
    "duplicate in quotes": "seed: 1\n'seed': 2",
    "list as key": "[a]: 1",
    "merge": "a: &a {b: 1}\n<<: *a",
    "two documents": "seed: 1\n---\nseed: 2",
    "null byte": "seed: a\0b",
    "half of a character": 'seed: "\\ud800"',
    "half of a character as key": '"\\ud800": 1',
    "escape beyond Unicode": 'seed: "\\UFFFFFFFF"',
    "version of many digits": f"%YAML {'9' * 5000}.1\n---\nseed: 1",
    "unclosed": "seed: [1",
    "two colons": "seed: b: c",
    "text": "hello",
    "key of two lines": '"a\\nb": 1',
    "key with control characters": '"a\\e[31m\\u202e\\u2028": 1',
    "long key": "k" * 900 + ": 1",
    "long text": "seed: " + "x" * 100_000,
    "many values": "seed: [" + "1," * 100_000 + "]",
    "large file": "#" * 300_000,
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("read", [load, read_sweep])
def test_a_file_of_other_than_plain_data_is_refused_in_one_printable_line(tmp_path, text, read):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000


def test_a_duplicate_key_is_named_with_its_line(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("partition:\n  alpha: 5\n  kind: dirichlet\n  alpha: 0.1\n")
    with pytest.raises(InputError, match=r"my\.yaml: .*'alpha' is there twice.*line 4"):
        load(path)


@pytest.mark.parametrize("text", ["seed: 1\r\nhead: {}\r\n", "\ufeffseed: 1", "# one\n---\nseed: 1 # one\n..."])
def test_line_ends_comments_and_a_byte_order_mark_change_nothing(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_bytes(text.encode())
    assert load(path) == load(None, ["seed=1"])


def test_an_alias_is_a_copy_of_what_it_stands_for():
    tree = yaml_text.parse("a: &x {b: [1]}\nc: *x")
    assert tree == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert tree["a"] is not tree["c"]


TEXTS = [
    *("", " a ", "a: b", "a #2", "[1]", "{a: 1}", "- a", "'", '"', "!!float x", "&a", "*a", "<<", "---", "...", "%"),
    *("5", "1.5", "1e5", "08", "a\nb", "a\tb", "\x1b[31m", "\x85", "\u2028", "名前", "🙂", "#", "@", "`", "|", ">"),
]


@pytest.mark.parametrize("text", [*(text for text, _ in SCALARS), *TEXTS])
def test_every_text_is_written_so_that_it_is_read_back_as_that_text(text):
    tree = {"key": text, "list": [text]}
    assert yaml_text.parse(yaml_text.dump(tree)) == tree


VALUES = [0, -1, 2**63 - 1, 1e-300, 1.7e308, 0.1, 1e16, 5e-324, -0.0, True, None, [], {}, [[1, {"a": []}]]]


@pytest.mark.parametrize("value", VALUES)
def test_every_value_is_read_back_as_it_was_written(value):
    back = yaml_text.parse(yaml_text.dump({"key": value}))["key"]
    assert (back, type(back)) == (value, type(value))


@pytest.mark.parametrize("name", ["1e-3", "yes", "null", "photos #2", "a: b", "0x1"])
def test_a_configuration_with_texts_like_numbers_reads_back_equal(tmp_path, name):
    config = load(None, [f"data.name='{name}'", f"data.root='{tmp_path}/{name}'"])
    assert isinstance(config, Config)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load(tmp_path / "config.yaml") == config
    assert config.data.name == name
