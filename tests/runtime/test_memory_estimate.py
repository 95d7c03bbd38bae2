"""The estimate of a run's memory: it grows with what takes memory, and refuses what no machine holds in one line."""

import pytest
from tiny import TINY

from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.models.weights.named import create_backbone
from fedprompt.runtime import memory
from fedprompt.runtime.build import build_data
from fedprompt.runtime.memory import Samples, check_memory, machine_bytes, needs, outline
from fedprompt.runtime.run import run_in_process

SAMPLES = Samples(classes=10, images=1000, client=100, tested=200)


def whole(*overrides):
    """Bytes of all parts."""
    config = load(None, [*TINY, *overrides])
    return sum(need.bytes for need in needs(config, outline(config), SAMPLES))


def test_an_outline_has_the_sizes_of_the_backbone():
    vit = create_backbone("test_vit", "random", 32)
    found = outline(load(None, TINY))
    assert (found.width, found.depth) == (vit.embed_dim, len(vit.blocks))
    assert found.weights == sum(p.numel() for name, p in vit.named_parameters() if not name.startswith("head."))
    assert found.tokens == vit.num_prefix_tokens + vit.patch_embed.num_patches


@pytest.mark.parametrize(
    ("overrides", "larger"),
    [
        ((), "head.hidden=100000"),
        ((), "prompt.pool_size=5000"),
        ((), "prompt.top_k=6"),
        ((), "backbone.image_size=320"),
        ((), "backbone.crop=0.1"),
        ((), "local.batch_size=64"),
        (("federation.clients=100",), "federation.cohort=100"),
        (("algorithm.name=fedavg",), "prompt.length=4000"),
        (("algorithm.name=fedavg", "prompt.kind=lora"), "prompt.rank=4000"),
        (("algorithm.name=fedavg", "prompt.kind=visual"), "prompt.channels=1000"),
        (("algorithm.name=fedavg", "federation.clients=50", "federation.cohort=50"), "runtime.group_size=50"),
        (("algorithm.name=dfedavg",), "federation.clients=1000"),
    ],
)
def test_the_estimate_grows_with_every_setting_that_takes_memory(overrides, larger):
    assert whole(*overrides, larger) > whole(*overrides)


@pytest.mark.parametrize(
    "larger",
    [
        ["backbone.image_size=4096"],
        ["backbone.crop=0.1", "backbone.image_size=2048"],
        ["algorithm.name=fedavg", "prompt.kind=visual", "prompt.channels=4096", "local.optimizer=cma"],
    ],
)
def test_what_no_machine_holds_is_refused_before_it_is_allocated(tmp_path, larger):
    config = load(None, [*TINY, *larger])
    with pytest.raises(InputError, match=r"^[\w.]+: [\d.]+ needs [\d,]+ MB of memory for .* MB here$"):
        list(run_in_process(config, tmp_path))


@pytest.mark.parametrize(
    ("larger", "key"),
    [
        (["head.hidden=1000000"], "head.hidden"),
        (["local.batch_size=1000000"], "local.batch_size"),
        (["backbone.image_size=1024"], "backbone.image_size"),
        (["algorithm.name=fedavg", "prompt.length=4096"], "prompt.length"),
    ],
)
def test_the_line_names_the_setting_that_is_out_of_proportion_and_what_there_is(larger, key):
    config = load(None, [*TINY, *larger])
    with pytest.raises(InputError, match=rf"^{key}: .* into the 20 MB here$"):
        check_memory(config, build_data(config), room=20 * 2**20)


def test_ordinary_settings_fit():
    for overrides in ([], ["algorithm.name=fedavg", "prompt.kind=full"], ["algorithm.name=dfedavg"]):
        config = load(None, [*TINY, *overrides])
        check_memory(config, build_data(config), room=256 * 2**20)


@pytest.mark.parametrize("text", ["1048576\n", "max\n", None])
def test_a_containers_limit_counts(tmp_path, monkeypatch, text):
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "limit",))
    whole_machine = machine_bytes()
    if text is not None:
        (tmp_path / "limit").write_text(text)
    assert machine_bytes() == (2**20 if text == "1048576\n" else whole_machine)
