"""Adapters and LoRA against plain transcriptions in float64, sample by sample."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Change
from fedprompt.models.backbones.blocks import run_block
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

COUNTS = (2, 3, 1)
KINDS = ("adapter", "lora")
VARIANTS = {
    "plain": {},
    "layer scale, register tokens": {"init_values": 0.5, "reg_tokens": 2},
    "no qkv bias, norms in attention": {"qkv_bias": False, "qk_norm": True, "scale_attn_norm": True},
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def on(backbone: ViT, kind: str, **prompt) -> PromptedModel:
    return PromptedModel(backbone, PromptOptions(kind=kind, **{"rank": 6, **prompt}), HeadOptions(hidden=16), 5)


def drawn(model: PromptedModel, clients: int = 3) -> list[dict[str, torch.Tensor]]:
    """The kind's params for some clients, none of them zero."""
    each = []
    for seed in range(clients):
        noise = torch.Generator().manual_seed(seed)
        start = model.kind.init(np.random.default_rng(seed))
        each.append({name: v + 0.2 * torch.randn(v.shape, generator=noise) for name, v in start.items()})
    return each


def features(model, params, batch):
    with torch.no_grad():
        return model.kind.features(stack(params), batch)[0]


def adapted(vit, tokens, params, layer):
    """Class feature of tokens [T, D] with an adapter, unit by unit, in float64."""
    vit, x = copy.deepcopy(vit).double(), tokens.double()[None]
    for number, block in enumerate(vit.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        y = block.mlp(block.norm2(x))
        if number >= layer:
            mine = {n.rpartition(".")[2]: v.double() for n, v in params.items() if n.startswith(f"adapter.{number}.")}
            change = mine["bias"].expand_as(y).clone()
            for down, shift, up in zip(mine["down"], mine["down_bias"], mine["up"], strict=True):
                unit = y @ down + shift
                change += (0.5 * unit * (1 + torch.erf(unit / math.sqrt(2))))[..., None] * up
            y = y + change
        x = x + block.ls2(y)
    return vit.norm(x)[0, 0]


def with_low_rank(vit, tokens, params, layer):
    """Class feature of tokens [T, D] by a float64 ViT whose qkv weights have the products of B and A added."""
    vit = copy.deepcopy(vit).double()
    for number in range(layer, len(vit.blocks)):
        weight = vit.blocks[number].attn.qkv.weight.data
        for first, part in ((0, "query"), (64, "value")):
            a, b = (params[f"lora.{number}.{part}.{x}"].double() for x in "ab")
            weight[first : first + 32] += b.T @ a
    return vit.norm(vit.blocks(tokens.double()[None]))[0, 0]


TRANSCRIPTIONS = {"adapter": adapted, "lora": with_low_rank}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_several_clients_at_once_equal_the_plain_transcription(make_vit, make_batch, images, kind, layer, changes):
    backbone = ViT(make_vit(seed=1, **changes), 28)
    model = on(backbone, kind, layer=layer)
    params = drawn(model)
    got = features(model, params, make_batch(COUNTS, images=images))
    plain = backbone.features_from(backbone.embed((images,)), 0)
    assert ((got - plain).abs().amax(1) > 0.05).all()
    tokens = backbone.embed((images,)).values
    for sample, owner in enumerate(np.repeat(np.arange(3), COUNTS)):
        expected = TRANSCRIPTIONS[kind](backbone.vit, tokens[sample], params[owner], layer)
        torch.testing.assert_close(got[sample].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("counts", [COUNTS, (2, 2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_several_groups_at_once_equal_one_by_one(backbone, make_batch, images, kind, counts):
    model, start = on(backbone, kind, layer=1), 0
    params = drawn(model)
    together = features(model, params, make_batch(counts, images=images))
    for client, count in enumerate(counts):
        alone = make_batch((count,), images=images[start : start + count])
        expected = features(model, params[client : client + 1], alone)
        torch.testing.assert_close(together[start : start + count], expected, atol=1e-5, rtol=1e-5)
        start += count


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_model_is_the_one_without(backbone, make_batch, images, kind, layer):
    model = on(backbone, kind, layer=layer)
    batch = make_batch(COUNTS, images=images)
    params = stack([model.kind.init(np.random.default_rng(seed)) for seed in range(3)])
    got, penalty, selected = model.kind.features(params, batch)
    torch.testing.assert_close(got, on(backbone, "none").kind.features({}, batch)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(penalty, torch.zeros(3))
    assert selected is None


def test_the_start_has_the_units_first_and_only_the_inward_weights_not_zero(backbone):
    shapes = {
        "adapter": {"down": (40, 32), "down_bias": (40,), "up": (40, 32), "bias": (32,)},
        "lora": {"query.a": (40, 32), "query.b": (40, 32), "value.a": (40, 32), "value.b": (40, 32)},
    }
    for kind, expected in shapes.items():
        params = on(backbone, kind, layer=1, rank=40).kind.init(np.random.default_rng(0))
        assert set(params) == {f"{kind}.{block}.{name}" for block in (1, 2) for name in expected}
        for name, value in params.items():
            own = name.split(".", 2)[2]
            assert tuple(value.shape) == expected[own]
            assert value.dtype == torch.float32
            if own in ("down", "query.a", "value.a"):
                assert 0.98 / math.sqrt(32) < value.abs().max() <= 1 / math.sqrt(32)
                assert abs(value.mean()) < 0.02
            else:
                assert not value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_tensor_of_every_client(backbone, make_batch, images, kind):
    model = on(backbone, kind)
    params = [{**model.init(np.random.default_rng(9)), **own} for own in drawn(model)]
    leaves = {name: value.requires_grad_() for name, value in stack(params).items()}
    losses, _ = model.losses(leaves, make_batch(COUNTS, images=images))
    grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert (grad.flatten(1).abs().amax(1) > 0).all(), name
    assert all(weights.grad is None for weights in backbone.vit.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tokens_give_what_images_give(backbone, make_batch, images, kind):
    model = on(backbone, kind, layer=2)
    params, tokens = drawn(model), backbone.run(backbone.embed((images,)), 0, 2)
    cached = features(model, params, make_batch(COUNTS, tokens=tokens))
    assert torch.equal(cached, features(model, params, make_batch(COUNTS, images=images)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_block_for_the_class_token_only_equals_the_whole_block(backbone, make_batch, kind):
    model = on(backbone, kind, layer=2)
    batch = make_batch(COUNTS)
    tokens = torch.randn(6, 17, 32, generator=torch.Generator().manual_seed(0))
    change = model.kind._change(stack(drawn(model)), 2, batch)
    whole = run_block(backbone.vit.blocks[2], tokens, change)
    short = run_block(backbone.vit.blocks[2], tokens, change, class_token_only=True)
    assert short.shape == (6, 1, 32)
    torch.testing.assert_close(short, whole[:, :1], atol=1e-5, rtol=1e-5)


def test_a_block_spelled_out_without_a_change_is_timms_block(make_vit):
    tokens = torch.randn(6, 17, 32, generator=torch.Generator().manual_seed(0))
    for changes in VARIANTS.values():
        block = make_vit(**changes).blocks[0].requires_grad_(False)
        torch.testing.assert_close(run_block(block, tokens, Change()), block(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_hidden_units_means_nothing(backbone, make_batch, images, kind):
    model = on(backbone, kind)
    params, batch = drawn(model), make_batch(COUNTS, images=images)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = [{n: v if n.endswith(".bias") else v[order] for n, v in client.items()} for client in params]
    before = features(model, params, batch)
    torch.testing.assert_close(features(model, moved, batch), before, atol=1e-5, rtol=1e-5)
    half = [{n: v[order] if n.endswith((".down", ".a")) else v for n, v in client.items()} for client in params]
    assert not torch.allclose(features(model, half, batch), before, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_may_have_its_own_number_of_units(backbone, make_batch, images, kind):
    model, units = on(backbone, kind), {0: 2, 1: 6, 2: 1}
    params = [
        {n: v if n.endswith(".bias") else v[: units[int(n.split(".")[1])]] for n, v in client.items()}
        for client in drawn(model)
    ]
    got = features(model, params, make_batch(COUNTS, images=images))
    tokens = backbone.embed((images,)).values
    for sample, owner in enumerate(np.repeat(np.arange(3), COUNTS)):
        expected = TRANSCRIPTIONS[kind](backbone.vit, tokens[sample], params[owner], 0)
        torch.testing.assert_close(got[sample].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gives_float32_features_and_gradients_near_the_exact_ones(make_vit, make_batch, images, kind):
    exact, rough = (on(ViT(make_vit(), 28, autocast=dtype), kind) for dtype in (None, torch.bfloat16))
    batch, found = make_batch(COUNTS, images=images), []
    for model in (exact, rough):
        leaves = {name: value.requires_grad_() for name, value in stack(drawn(exact)).items()}
        feature = model.kind.features(leaves, batch)[0]
        direction = torch.randn(feature.shape, generator=torch.Generator().manual_seed(0))
        grads = torch.autograd.grad((feature * direction).sum(), list(leaves.values()))
        assert feature.dtype == torch.float32
        assert all(grad.dtype == torch.float32 for grad in grads)
        found.append((feature.detach(), torch.cat([grad.flatten() for grad in grads])))
    for one, other in zip(*found, strict=True):
        assert 0 < (one - other).abs().mean() / one.abs().mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_backbone_cannot_do_is_refused_in_one_line(make_vit, backbone, kind):
    class Unusual(type(make_vit().blocks[0])):
        def forward(self, x, **_):
            return super().forward(x) + x.mean(1, keepdim=True)

    with pytest.raises(InputError, match=rf"^prompt\.kind: '{kind}' needs plain .* allowed: none, .*$"):
        on(ViT(make_vit(block_fn=Unusual), 28), kind)
    mixed = make_vit()
    mixed.blocks[0] = make_vit(block_fn=Unusual).blocks[0]
    on(ViT(mixed, 28), kind, layer=1)  # what lies below is run as it is
    with pytest.raises(InputError, match=r"^prompt\.layer: 3; allowed: 0 to 2 for this backbone$"):
        on(backbone, kind, layer=3)
