"""The configuration: what is read is what was meant, and what is wrong is told in one line."""

import re

import pytest

from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.errors import InputError


def refusal(*overrides, path=None):
    """The one line about a wrong configuration."""
    with pytest.raises(InputError) as caught:
        load(path, list(overrides))
    line = str(caught.value)
    assert line.isprintable()
    return line


def test_without_file_and_overrides_all_defaults_hold():
    config = load()
    assert (config.algorithm.name, config.prompt.kind, config.data.name) == ("pfpt", "pool", "fashion-mnist-small")
    assert config.algorithm.settings["sweeps"] == 50


def test_a_file_and_overrides_are_laid_over_the_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: 3\npartition:\n  alpha: 0.5\nfederation:\n  clients: 8\n  cohort: 2\n")
    config = load(path, ["federation.cohort=4", "partition.kind=iid"])
    assert (config.seed, config.partition.alpha, config.partition.kind) == (3, 0.5, "iid")
    assert (config.federation.clients, config.federation.cohort, config.federation.rounds) == (
        8,
        4,
        load().federation.rounds,
    )


def test_a_section_whose_keys_are_all_commented_out_keeps_its_defaults(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("local:\n  # lr: 1.0\nalgorithm:\nseed: 1\n")
    assert load(path, ["local.epochs=2"]).local.model_dump() == load(None, ["local.epochs=2"]).local.model_dump()


@pytest.mark.parametrize("text", ["5e-4", "0.0005", "'5e-4'", "5.0e-04"])
def test_numbers_in_exponent_notation_are_numbers(text):
    assert load(None, [f"local.lr={text}"]).local.lr == 0.0005  # YAML 1.1 itself reads 5e-4 as text


@pytest.mark.parametrize("key", ["local.lr", "prompt.kind", "data.root", "seed", "algorithm.name"])
def test_an_override_without_a_value_is_refused_and_null_is_none(key):
    line = refusal(f"{key}=  ")
    assert line.startswith(f"{key}: ")
    assert "null" in line
    assert load(None, ["prompt.kind=null", "local.lr=~", "data.root=null"]) == load()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.name=fedavg", "prompt.kind=deep", "local.betas=[0.8,0.99]", "data.root=/some/where"],
        ["algorithm.schedule=joint", "algorithm.max_pool=30", "runtime.gpus_per_worker=0.25"],
    ],
)
def test_a_written_configuration_reads_back_as_the_same(tmp_path, overrides):
    config = load(None, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load(path) == config
    assert load(path).algorithm.settings == config.algorithm.settings


def test_the_kind_of_prompts_is_the_algorithms_own_unless_given():
    assert load(None, ["algorithm.name=head"]).prompt.kind == "none"
    assert load(None, ["algorithm.name=fedavg"]).prompt.kind == "prompt"
    assert load(None, ["algorithm.name=fedavg", "prompt.kind=pool"]).prompt.kind == "pool"


def test_what_is_read_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load().local.lr = 1.0


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("fedration.clients=3", ["fedration", "did you mean 'federation'?", "backbone"]),
        ("federation.client=3", ["federation.client", "did you mean 'clients'?", "cohort, rounds"]),
        ("algorithm.name=pftp", ["algorithm.name", "'pftp'", "did you mean 'pfpt'?", "fedavg"]),
        ("algorithm.sweps=3", ["algorithm.sweps", "did you mean 'sweeps'?", "max_pool"]),
        ("algorithm.sweeps=many", ["algorithm.sweeps", "'many'", "a whole number"]),
        ("algorithm.schedule=joined", ["algorithm.schedule", "'joined'", "'sequential' or 'joint'"]),
        ("federation.clients=abc", ["federation.clients", "'abc'", "a whole number"]),
        ("federation.clients=3.5", ["federation.clients", "3.5", "a whole number"]),
        ("local.lr=fast", ["local.lr", "'fast'", "a number"]),
        ("head.personal=perhaps", ["head.personal", "'perhaps'", "true or false"]),
        ("data.name=5", ["data.name", "found 5", "text"]),
        ("partition.alpha=0", ["partition.alpha", "found 0", "greater than 0"]),
        ("partition.alpha=.nan", ["partition.alpha", "nan", "finite"]),
        ("partition.kind=dirichlt", ["partition.kind", "did you mean 'dirichlet'?", "shards"]),
        ("runtime.precision=fp16", ["runtime.precision", "'fp16'", "'bfloat16'"]),
        ("federation.cohort=21", ["federation.cohort", "21", "federation.clients = 20", "1 to 20"]),
        ("prompt.top_k=21", ["prompt.top_k", "21", "prompt.pool_size = 20", "1 to 20"]),
        ("prompt.kind=deep", ["prompt.kind", "'deep'", "'pfpt'", "allowed: pool"]),
        ("prompt.init=patch", ["prompt.init", "did you mean 'patches'?", "'class'"]),
        ("local.betas=[0.9]", ["local.betas", "0.9"]),
        ("local.betas=[0.9, 1.5]", ["local.betas", "1.5", "below 1"]),
        ("runtime.gpus_per_worker=1.5", ["runtime.gpus_per_worker", "1.5", "fraction"]),
        ("lr=0.1", ["lr: unknown key", "did you mean 'local.lr'", "allowed here: seed, data"]),
        ("epoch=3", ["did you mean 'local.epochs'?"]),
        ("crop=0.5", ["did you mean 'backbone.crop'?"]),
        ("mu=1", ["did you mean 'algorithm.mu'?"]),
        ("federation.lr=0.1", ["federation.lr: unknown key", "did you mean 'local.lr'", "cohort, rounds"]),
        ("local.clients=3", ["did you mean 'federation.clients'?"]),
        ("algorithm.epochs=3", ["did you mean 'local.epochs'?", "allowed here: name, schedule"]),
        ("algorithm.mu=1", ["algorithm.mu: not a key of 'pfpt'", "fedmem, fedprox", "allowed here: name, schedule"]),
        ("federation.rounds=1000000", ["federation.rounds", "less than or equal to 999999"]),
        ("runtime.gpus_per_worker=1e-300", ["runtime.gpus_per_worker", "a fraction from 0.01 to 1"]),
        ("runtime.cpus_per_worker=1e10", ["runtime.cpus_per_worker", "less than or equal to 256"]),
        ("backbone.crop=1e-300", ["backbone.crop", "greater than or equal to 0.1"]),
        ("federation=5", ["federation", "found 5", "clients, cohort, rounds"]),
        ("algorithm=fedavg", ["algorithm", "'fedavg'", "name"]),
        ("federation.dropout=1", ["federation.dropout", "found 1", "less than 1"]),
        ("federation.deadline=0", ["federation.deadline", "found 0", "greater than 0"]),
        ("federation.speed_spread=-1", ["federation.speed_spread", "-1", "greater than or equal to 0"]),
        ("federation.max_lost=1.5", ["federation.max_lost", "1.5", "less than or equal to 1"]),
        ("federation.rounds=true", ["federation.rounds", "found True", "a whole number"]),
        ("local.lr=yes", ["local.lr", "found 'yes'", "a number"]),
        ("seed=false", ["seed", "found False", "a whole number"]),
        ("algorithm.sweeps=true", ["algorithm.sweeps", "found True", "a whole number"]),
        ("head.personal=yes", ["head.personal", "found 'yes'", "true or false"]),
        ("head.personal=1", ["head.personal", "found 1", "true or false"]),
        ("head.personal='true'", ["head.personal", "found 'true'", "true or false"]),
        ("seed=-1", ["seed", "-1", "0"]),
        ("seed.of=3", ["seed", "whole number"]),
        ("rounds", ["'rounds'", "key.path=value"]),
        ("=3", ["'=3'", "key.path=value"]),
        ("a\nb=3", [r"a\nb", "key.path=value"]),
        ("\udcff=3", [r"\udcff", "key.path=value"]),
        ("backbone.name=\udcff", ["backbone.name", "allowed: Unicode"]),
        ("federation..rounds=3", ["federation..rounds", "key.path=value"]),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_is_allowed(override, named):
    line = refusal(override)
    for part in named:
        assert part in line


PYDANTICS = (
    "model_fields",
    "model_config",
    "model_extra",
    "model_dump",
    "__class__",
    "__dict__",
    "copy",
    "json",
    "self",
)


@pytest.mark.parametrize("name", PYDANTICS)
@pytest.mark.parametrize("section", ["", "data.", "algorithm."])
def test_names_that_python_or_a_library_uses_are_unknown_keys_like_others(section, name):
    for value in ("3", "true", "null", "{a: 1}"):
        assert refusal(f"{section}{name}={value}").startswith(f"{section}{name}: unknown key")


NO_NUMBERS = ("9" * 5000, "1" + "0" * 300, "1e400", "-1e400", ".inf", ".nan", "true", "'x'", "[1]", "{a: 1}", "[[[]]]")


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name not in ("seed", "algorithm")])
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_no_number_of_any_section_is_without_limits(section, value):
    fields = type(getattr(load(), section)).model_fields
    for name in [name for name, field in fields.items() if re.search("int|float", str(field.annotation))]:
        assert refusal(f"{section}.{name}={value}").startswith(f"{section}.{name}")


@pytest.mark.parametrize("value", ["9" * 350, "x" * 100_000, "[" + "1," * 900 + "]", "{" + "a" * 10_000 + ": 1}"])
def test_a_message_shows_the_beginning_of_what_is_large(value):
    for key in ("seed", "local.betas", "algorithm.name", "algorithm"):
        line = refusal(f"{key}={value}")
        assert "…" in line
        assert len(line) < 1000


def test_nothing_can_be_set_below_a_value(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("federation: 5\n")
    assert "federation.rounds" in refusal("federation.rounds=3", path=path)


def test_personal_heads_do_not_go_with_a_single_client():
    line = refusal("algorithm.name=centralized", "head.personal=true")
    assert "head.personal" in line
    assert "centralized" in line


def test_images_are_public_only_where_something_is_made_of_them():
    line = refusal("prompt.init=class", "prompt.layer=0")
    assert "prompt.init: 'class'" in line
    assert "allowed: uniform, patches" in line
    shots = {
        ("prompt.init=class",): 8,
        ("prompt.init=patches", "prompt.layer=0", "head.shots=3"): 3,
        ("prompt.init=class", "algorithm.name=fedavg", "prompt.kind=lora", "prompt.layer=0"): 0,
        (): 0,
    }
    for overrides, expected in shots.items():
        assert load(None, list(overrides)).public_shots == expected


@pytest.mark.parametrize("override", ["federation.dropout=0.1", "federation.deadline=2"])
def test_absence_does_not_go_with_a_single_client(override):
    line = refusal("algorithm.name=centralized", override)
    assert override.partition("=")[0] in line
    assert "has one client" in line


def test_true_is_still_true_where_it_is_asked_for():
    assert load(None, ["head.personal=true", "tracking.tensorboard=false"]).head.personal is True


def test_further_wrong_keys_are_counted():
    assert refusal("seed=-1", "local.lr=-1", "federation.rounds=0").endswith("(and 2 more wrong keys)")
    assert refusal("seed=-1", "local.lr=-1").endswith("(and 1 more wrong key)")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1, 2", "not valid YAML"),
        (b"a: b: c", "not valid YAML"),
        (b"born: 2020-13-45", "born: unknown key"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"- 1\n- 2\n", "found a list"),
        (b"hello", "found a str"),
        (b"federation: [1]", "federation: found [1]"),
        (b"3: 4", "3: unknown key"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, content, told):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    assert told in refusal(path=path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert "missing.yaml" in refusal(path=tmp_path / "missing.yaml")
    assert "is a folder" in refusal(path=tmp_path)


def test_tags_in_a_file_execute_nothing(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert "not valid YAML" in refusal(path=path)
    assert not (tmp_path / "made").exists()


def test_optimizer_and_rates_left_out_are_the_methods_own():
    assert load().local.optimizer == "adam"
    scaffold = load(None, ["algorithm.name=scaffold"]).local
    assert (scaffold.optimizer, scaffold.lr) == ("sgd", 0.01)
    fedavg = load(None, ["algorithm.name=fedavg", "local.optimizer=sgd", "local.prompt_lr=0.25"]).local
    assert (fedavg.lr, fedavg.prompt_lr) == (0.01, 0.25)


def test_rates_left_out_are_those_that_validation_preferred_for_the_kind():
    rates = {}
    for kind in ("pool", "prompt", "lora"):
        local = load(None, ["algorithm.name=fedavg", f"prompt.kind={kind}"]).local
        rates[kind] = (local.lr, local.prompt_lr)
    assert rates == {"pool": (5e-4, 1e-3), "prompt": (1e-3, 3e-3), "lora": (1e-3, 3e-4)}
    assert load(None, ["algorithm.name=head"]).local.lr == 1e-3
    given = load(None, ["algorithm.name=fedavg", "local.prompt_lr=0.5"]).local
    assert (given.lr, given.prompt_lr) == (1e-3, 0.5)


def test_a_whole_backbone_is_trained_more_carefully_than_prompts():
    full = load(None, ["algorithm.name=fedavg", "prompt.kind=full"]).local
    assert full.prompt_lr < load(None, ["algorithm.name=fedavg"]).local.prompt_lr / 10


def test_an_optimizer_that_does_not_go_with_the_method_is_refused():
    told = refusal("algorithm.name=scaffold", "local.optimizer=adam")
    assert told == "local.optimizer: 'adam' does not go with algorithm.name = 'scaffold'; allowed: sgd"
