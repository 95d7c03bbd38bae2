"""timm's families of Vision Transformers: each gives timm's own features, and takes prompts and every other kind."""

from __future__ import annotations

import copy
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedprompt.blackbox.service import Scorer
from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Change, Tokens
from fedprompt.models.backbones.blocks import is_plain, run_block
from fedprompt.models.backbones.registry import BACKBONES, backbone
from fedprompt.models.backbones.vit import ViT, to_pixels
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions, make_kind
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack
from fedprompt.models.weights.named import create_backbone, load_backbone
from fedprompt.models.weights.timm_import import import_timm

# by timm's names, at a fraction of their width and depth; SIDE pixels are a multiple of every patch
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 3}
FAMILIES = {
    "vit_base_patch16_224": 16,
    "vit_base_patch16_gap_224": 16,
    "vit_base_patch32_clip_224.openai": 32,
    "vit_base_patch16_siglip_224": 16,  # attention pooling, no class token
    "vit_base_patch16_siglip_gap_224": 16,
    "vit_so150m_patch16_reg4_map_256": 16,  # registers without a class token
    "vit_small_patch14_dinov2": 14,
    "vit_small_patch14_reg4_dinov2": 14,
    "vit_small_patch16_dinov3": 16,  # rotary positions, class token and registers, average pooling
    "vit_small_patch16_rope_224": 16,
    "vit_small_patch16_rope_mixed_224": 16,  # rotations of each block and head
    "vit_pe_core_base_patch16_224": 16,
    "vit_betwixt_patch16_rope_reg4_gap_256": 16,
    "deit_small_patch16_224": 16,
    "deit_small_distilled_patch16_224": 16,  # reads two tokens
    "deit3_small_patch16_224": 16,
    "eva02_base_patch14_224": 14,
    "eva02_base_patch16_clip_224": 16,
    "beit_base_patch16_224": 16,  # biases by relative position
    "beitv2_base_patch16_224": 16,
}
KINDS = ("none", "prompt", "deep", "pool", "adapter", "lora", "visual", "full")
families = pytest.mark.parametrize("name", FAMILIES)
L = 5


@cache
def made(name: str) -> ViT:
    """A small model of a family, whose weights are noise so that every tensor matters."""
    side = 3 * FAMILIES[name]
    vit = import_timm().create_model(name, pretrained=False, img_size=side, **SMALL).eval()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in vit.parameters():
            start = 1 if weights.ndim == 1 and weights.mean() > 0.5 else 0
            weights.copy_(start + 0.12 * torch.randn(weights.shape, generator=noise))
    return ViT(vit, side)


def pictures(count: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def drawn(*shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def pre_logits(backbone: ViT, images: Tensor) -> Tensor:
    """What timm's own head reads of images."""
    pixels = to_pixels(images, backbone.image_size, 1.0)
    mean, std = (torch.tensor(backbone.vit.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return backbone.vit.forward_head(backbone.vit.forward_features((pixels - mean) / std), pre_logits=True)


@families
def test_features_are_what_timms_own_head_reads(name):
    backbone, images = made(name), pictures()
    expected = pre_logits(backbone, images)
    with torch.no_grad():
        tokens = backbone.embed((images,))
        assert tokens.values.shape == (3, backbone.tokens_per_sample, backbone.width)
        torch.testing.assert_close(backbone.features_from(tokens, 0), expected, atol=1e-4, rtol=1e-4)
        in_pieces = backbone.features_from(backbone.run(tokens, 0, 1), 1)
        torch.testing.assert_close(in_pieces, expected, atol=1e-4, rtol=1e-4)
        whole = backbone.read_out(backbone.run(tokens, 0, backbone.depth))
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


def padded_bias(attention: nn.Module) -> Tensor:
    """BEiT's bias [1, heads, T + L, T + L], number by number: zero wherever a prompt, at 1 to L, takes part."""
    own = attention._get_rel_pos_bias()
    size = own.shape[-1] + L
    bias = torch.zeros(1, own.shape[1], size, size)
    place = [0, *range(L + 1, size)]
    for i, row in enumerate(place):
        bias[:, :, row, place] = own[:, :, i]
    return bias


def with_room_for_prompts(backbone: ViT) -> nn.Module:
    """timm's model, told that there are L more tokens that are no part of the image."""
    vit = copy.deepcopy(backbone.vit)
    for block in vit.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += L
        if getattr(block.attn, "relative_position_bias_table", None) is not None:
            block.attn._get_rel_pos_bias = partial(torch.clone, padded_bias(block.attn))
    return vit


@families
def test_prompts_have_no_place_in_the_image_and_are_not_pooled(name):
    backbone, prompts = made(name), drawn(3, L, 64)
    at, vit = backbone.prompt_position, with_room_for_prompts(backbone)
    with torch.no_grad():
        tokens = backbone.embed((pictures(),))
        x = torch.cat([tokens.values[:, :at], prompts, tokens.values[:, at:]], dim=1)
        rope = vit.rope.get_embed(vit.patch_embed.grid_size) if getattr(vit, "rope", None) is not None else None
        for number, block in enumerate(vit.blocks):
            of_block = rope[number] if rope is not None and vit.rope_mixed else rope
            x = block(x) if rope is None else block(x, rope=of_block)
        kept = torch.cat([x[:, :at], x[:, at + L :]], dim=1)
        expected = vit.forward_head(vit.norm(kept), pre_logits=True)
        got = backbone.features_from(tokens.with_prompts(prompts, at), 0)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(got, backbone.features_from(tokens, 0), atol=1e-2)


@families
def test_a_block_spelled_out_is_timms_own(name):
    backbone = made(name)
    assert backbone.changeable_from(0)
    unchanged = [Change()] * backbone.depth
    with torch.no_grad():
        tokens = backbone.embed((pictures(),))
        got = backbone.features_from(tokens, 0, unchanged)
        torch.testing.assert_close(got, backbone.features_from(tokens, 0), atol=1e-4, rtol=1e-4)


def leaves(model: PromptedModel) -> dict[str, Tensor]:
    """Params off their start, stacked, that ask for gradients."""
    noise = np.random.default_rng(1)
    params = model.init(np.random.default_rng(0))
    moved = {k: v + torch.from_numpy(noise.normal(0, 0.05, v.shape).astype(np.float32)) for k, v in params.items()}
    return {name: value.requires_grad_() for name, value in stack([moved]).items()}


@families
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_feature_and_trains_all_its_tensors(make_batch, name, kind):
    options = PromptOptions(kind, length=4, layer=1, pool_size=6, top_k=3, rank=2, channels=4)
    model = PromptedModel(made(name), options, HeadOptions(hidden=8), 5)
    params = leaves(model)
    batch = make_batch((3,), images=pictures(), labels=torch.tensor([0, 1, 2]))
    losses, output = model.losses(params, batch)
    losses.sum().backward()
    plain = pre_logits(model.backbone, pictures())
    feature = model.kind.features(params, batch)[0]
    assert torch.allclose(feature, plain, atol=1e-4) == (kind == "none")
    assert torch.isfinite(output.logits).all()
    # keys' biases move all scores of a query alike
    untouched = {key for key, value in params.items() if value.grad is None or not value.grad.abs().max() > 0}
    assert untouched <= {key for key in params if key.endswith(("mask_token", "k_proj.bias"))}


@families
@pytest.mark.parametrize("kind", ["adapter", "lora", "full"])
def test_kinds_that_start_as_the_frozen_model_do_so(make_batch, name, kind):
    model = PromptedModel(made(name), PromptOptions(kind, rank=2), HeadOptions(hidden=8), 5)
    params = stack([model.init(np.random.default_rng(0))])
    with torch.no_grad():
        got = model.kind.features(params, make_batch((3,), images=pictures()))[0]
    torch.testing.assert_close(got, pre_logits(model.backbone, pictures()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("kind", ["prompt", "deep", "pool", "adapter", "lora"])
def test_clients_that_train_as_one_batch_are_those_that_train_alone(make_batch, name, kind):
    options = PromptOptions(kind, length=4, layer=1, pool_size=6, top_k=3, rank=2)
    model = PromptedModel(made(name), options, HeadOptions(hidden=8), 5)
    of_clients = [model.init(np.random.default_rng(seed)) for seed in range(2)]
    images = pictures(5)
    with torch.no_grad():
        together = model.forward(stack(of_clients), make_batch((3, 2), images=images)).logits
        for params, own in zip(of_clients, (slice(0, 3), slice(3, 5)), strict=True):
            alone = model.forward(stack([params]), make_batch((own.stop - own.start,), images=images[own])).logits
            torch.testing.assert_close(together[own], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "beit_base_patch16_224", "deit_small_distilled_patch16_224"]
)
def test_bfloat16_gives_nearly_the_same_with_prompts(name):
    exact = made(name)
    rough = ViT(exact.vit, exact.image_size, autocast=torch.bfloat16)
    with torch.no_grad():
        features = []
        for one in (exact, rough):
            tokens = one.embed((pictures(),)).with_prompts(drawn(3, L, 64), one.prompt_position)
            features.append(one.features_from(tokens, 0))
    assert features[1].dtype == torch.float32
    assert (features[1] - features[0]).abs().mean() < 0.05 * features[0].abs().mean()


# --- what cannot work ---------------------------------------------------------------------------------------------


def outline(name: str, image_size: int = 48) -> ViT:
    return load_backbone(name, "nowhere.pt", image_size, crop=1.0, device=torch.device("meta"), autocast=None)


REFUSED = {
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "naflexvit_base_patch16_gap": "NaFlexVit",
    "samvit_base_patch16": "VisionTransformerSAM",
    "xcit_nano_12_p16_224": "Xcit",
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_take_no_prompts_are_named_in_one_line(name):
    with pytest.raises(InputError) as caught:
        outline(name)
    text = str(caught.value)
    assert text.startswith(f"backbone.name: '{name}' takes no prompts, for it is ")
    assert REFUSED[name] in text or "no Vision Transformer" in text
    assert "; allowed: " in text
    assert "\n" not in text


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_dlittle_patch16_reg1_gap_256"])
def test_kinds_that_change_blocks_are_refused_before_weights_are_made(name, kind):
    sketch = outline(name)
    assert {p.device.type for p in sketch.weights().values()} == {"meta"}
    with pytest.raises(InputError, match=rf"^prompt\.kind: '{kind}' needs plain pre-norm blocks, .* allowed: none, "):
        make_kind(sketch, PromptOptions(kind))
    make_kind(sketch, PromptOptions("deep"))


def test_prompts_cannot_start_like_class_tokens_where_there_are_none():
    with pytest.raises(InputError, match=r"^prompt\.init: 'class' .* allowed: uniform, patches$"):
        make_kind(outline("vit_base_patch16_siglip_224"), PromptOptions("prompt", layer=1, init="class"))
    make_kind(outline("vit_small_patch16_dinov3"), PromptOptions("prompt", layer=1, init="class"))


def test_a_distilled_model_has_no_classifier_that_reads_the_feature():
    model = made("deit_small_distilled_patch16_224")
    with pytest.raises(InputError, match=r"^head\.input: 'logits'"):
        PromptedModel(model, PromptOptions("none"), HeadOptions(input="logits"), 5)


# --- weights and names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_vit2", "test_vit3", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"]
)
def test_weights_come_from_a_file(tmp_path, name):
    side = 42 if "14" in name else 32
    saved = create_backbone(name, "random", side).state_dict()
    changed = {key: value + 0.01 for key, value in saved.items() if not key.startswith(("head.", "head_dist."))}
    torch.save(changed, tmp_path / "w.pt")
    found = create_backbone(name, str(tmp_path / "w.pt"), side)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in changed.items())
    assert isinstance(found.head, nn.Identity)


def test_positions_relative_to_each_other_are_resampled_to_another_grid(tmp_path):
    timm = import_timm()
    name, how = "beit_base_patch16_224", {"embed_dim": 32, "num_heads": 2, "depth": 1}
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, "create_model", lambda *given, **more: create(*given, **{**more, **how}))
        larger = create_backbone(name, "random", 64)
        with torch.no_grad():
            larger.blocks[0].attn.relative_position_bias_table.copy_(torch.full((52, 2), 0.5))
        torch.save(larger.state_dict(), tmp_path / "w.pt")
        found = create_backbone(name, str(tmp_path / "w.pt"), 48)
    table = found.blocks[0].attn.relative_position_bias_table
    assert table.shape == (28, 2)
    torch.testing.assert_close(table, torch.full((28, 2), 0.5))


def test_a_registered_backbone_comes_before_timms(registries):
    asked = []

    @backbone("test_vit", "ours")
    def make(weights, image_size, *, crop, device, autocast):
        asked.append((weights, image_size, crop, device.type, autocast))
        return made("vit_base_patch16_224")

    found = load_backbone("test_vit", "w", 48, crop=0.9, device=torch.device("cpu"), autocast=torch.bfloat16)
    assert found is made("vit_base_patch16_224")
    assert asked == [("w", 48, 0.9, "cpu", torch.bfloat16)]
    assert BACKBONES.get("test_vit").about == "ours"
    with pytest.raises(InputError, match="registered twice"):
        backbone("test_vit", "another")(made)


def test_tokens_say_which_of_them_are_prompts():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tokens = Tokens(torch.arange(6.0).view(2, 3, 1), mask)
    more = tokens.with_prompts(torch.full((2, 2, 1), 9.0), 1)
    assert more.values.squeeze(2).tolist() == [[0, 9, 9, 1, 2], [3, 9, 9, 4, 5]]
    assert more.mask.tolist() == [[True, True, True, True, False], [True] * 5]
    assert more.prompts == 2
    back = more.without_prompts(1)
    assert torch.equal(back.values, tokens.values)
    assert torch.equal(back.mask, mask)
    assert back.prompts == 0


def test_short_last_block_is_used_wherever_a_class_token_is_read(monkeypatch):
    names = [name for name in FAMILIES if made(name)._short_last_block]
    assert {"vit_base_patch16_224", "vit_small_patch16_rope_224", "eva02_base_patch16_clip_224"} <= set(names)
    assert not {"beit_base_patch16_224", "vit_base_patch16_siglip_224", "deit_small_distilled_patch16_224"} & set(names)
    for name in names:
        vit, tokens = made(name), made(name).embed((pictures(),)).values
        assert is_plain(vit.blocks[-1])
        position = vit._positions(Tokens(tokens)).of(2)
        whole = run_block(vit.blocks[-1], tokens, position=position)
        short = run_block(vit.blocks[-1], tokens, position=position, class_token_only=True)
        torch.testing.assert_close(short, whole[:, :1], atol=1e-5, rtol=1e-4)


# --- CLIP's joint space -------------------------------------------------------------------------------------------


def joint(head: HeadOptions, prototypes: Tensor) -> PromptedModel:
    return PromptedModel(
        made("vit_base_patch32_clip_224.openai"), PromptOptions("visual", channels=4), head, 3, prototypes
    )


def test_texts_of_the_joint_space_classify_images(make_batch):
    clip, images = made("vit_base_patch32_clip_224.openai"), pictures()
    assert (clip.width, clip.classes) == (64, 512)
    places = clip.vit.head(pre_logits(clip, images))  # where the images lie
    texts = places[[2, 0, 1]] * torch.tensor([[2.0], [0.5], [1.0]])
    head = HeadOptions("prototypes", input="logits", scale=100.0)
    model = joint(head, texts)
    params = stack([model.init(np.random.default_rng(0))])
    batch = make_batch((3,), images=images)
    with torch.no_grad():
        logits = model.forward(params, batch).logits
        cosines = nn.functional.cosine_similarity(places[:, None], texts[None], dim=-1)
    torch.testing.assert_close(logits, 100 * cosines, atol=1e-2, rtol=1e-4)
    assert logits.argmax(1).tolist() == [1, 2, 0]
    pixels = to_pixels(images, clip.image_size, 1.0)
    served = Scorer(clip, texts, head)(pixels.numpy())
    torch.testing.assert_close(torch.from_numpy(served), logits.log_softmax(1), atol=1e-2, rtol=1e-3)
