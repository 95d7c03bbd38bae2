"""How prompts enter the backbone, against plain loops over samples and blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedprompt.errors import InputError
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

COUNTS = (2, 3, 1)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (6, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn(model: PromptedModel, clients: int = 3) -> list[dict[str, torch.Tensor]]:
    """Params of some clients, with prompts large enough to matter."""
    each = [model.init(np.random.default_rng(seed)) for seed in range(clients)]
    return [{n: v if n.startswith("head.") else 4 * v for n, v in params.items()} for params in each]


def features(model, params, batch):
    with torch.no_grad():
        return model.kind.features(stack(params), batch)


def owners():
    return np.repeat(np.arange(3), COUNTS)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_shallow_prompt_stands_behind_the_class_token_from_its_block_on(make_model, make_batch, images, layer):
    model = make_model("prompt", layer=layer)
    params, vit = drawn(model), model.backbone.vit
    got, penalty, selected = features(model, params, make_batch(COUNTS, images=images))
    tokens = model.backbone.embed((images,)).values
    for sample, owner in enumerate(owners()):
        x = tokens[sample : sample + 1]
        for number, block in enumerate(vit.blocks):
            if number == layer:
                x = torch.cat([x[:, :1], params[owner]["prompt"][None], x[:, 1:]], dim=1)
            x = block(x)
        assert x.shape[1] == 17 + 4
        torch.testing.assert_close(got[sample], vit.norm(x)[0, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(penalty, torch.zeros(3))
    assert selected is None


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_deep_prompts_take_the_old_ones_place_before_every_block(make_model, make_batch, images, layer):
    model = make_model("deep", layer=layer)
    params, vit = drawn(model), model.backbone.vit
    assert params[0]["deep"].shape == (3 - layer, 4, 32)
    got, penalty, selected = features(model, params, make_batch(COUNTS, images=images))
    tokens = model.backbone.embed((images,)).values
    for sample, owner in enumerate(owners()):
        x = tokens[sample : sample + 1]
        for number, block in enumerate(vit.blocks):
            if number >= layer:
                patches = x[:, 1:] if number == layer else x[:, 1 + 4 :]
                x = torch.cat([x[:, :1], params[owner]["deep"][number - layer][None], patches], dim=1)
            x = block(x)
        assert x.shape[1] == 17 + 4
        torch.testing.assert_close(got[sample], vit.norm(x)[0, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(penalty, torch.zeros(3))
    assert selected is None


def test_every_blocks_deep_prompt_changes_the_feature(make_model, make_batch, images):
    model = make_model("deep")
    params = drawn(model)
    before = features(model, params, make_batch(COUNTS, images=images))[0]
    for block in range(3):
        changed = [{**p, "deep": p["deep"].clone()} for p in params]
        changed[1]["deep"][block] *= -1
        after = features(model, changed, make_batch(COUNTS, images=images))[0]
        moved = (after - before).abs().amax(1) > 1e-3
        assert moved.tolist() == [False, False, True, True, True, False]  # only that client's samples


def test_without_prompts_the_feature_is_the_plain_backbones(make_model, make_batch, images):
    model = make_model("none")
    got, penalty, selected = features(model, drawn(model), make_batch(COUNTS, images=images))
    vit, tokens = model.backbone.vit, model.backbone.embed((images,)).values
    torch.testing.assert_close(got, vit.norm(vit.blocks(tokens))[:, 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(penalty, torch.zeros(3))
    assert selected is None


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
@pytest.mark.parametrize("layer", [1, 2])
def test_cached_tokens_and_query_give_what_images_give(make_model, make_batch, images, kind, layer):
    model = make_model(kind, layer=layer)
    params, backbone = drawn(model), model.backbone
    tokens = backbone.run(backbone.embed((images,)), 0, layer)
    query = backbone.features_from(tokens, layer)
    cached = features(model, params, make_batch(COUNTS, tokens=tokens, query=query))
    computed = features(model, params, make_batch(COUNTS, images=images))
    torch.testing.assert_close(cached, computed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
def test_prompts_start_uniform_in_the_published_bounds(make_model, kind):
    model = make_model(kind, length=500, pool_size=500)
    params = model.kind.init(np.random.default_rng(0))
    bound = math.sqrt(6 / (3 * 7**2 + 32))
    prompts = next(iter(params.values()))
    assert 0.99 * bound < prompts.abs().max() <= bound
    assert prompts.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    if kind == "pool":
        assert params["query_proj"].shape == (32, 32)
        assert 0.99 < params["query_proj"].abs().max() <= 1


@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
@pytest.mark.parametrize(("init", "which"), [("patches", slice(3, None)), ("class", slice(0, 1))])
def test_prompts_can_start_like_the_tokens_that_they_will_stand_among(make_vit, images, kind, init, which):
    backbone = ViT(make_vit(reg_tokens=2), 28)  # registers are neither
    options = PromptOptions(kind, length=4000, pool_size=4000, layer=1, init=init, public=(images.numpy(),))
    params = PromptedModel(backbone, options, HeadOptions(hidden=16), 5).init(np.random.default_rng(0))
    prompts = params[kind] if kind == "deep" else params[kind][None]  # [blocks, n, D]
    tokens = backbone.embed((images,))
    for block, drawn_there in enumerate(prompts, start=1):
        there = backbone.run(tokens, 0, block).values[:, which].flatten(0, 1)
        spread = there.std(0, correction=0)
        assert spread.min() > 0
        torch.testing.assert_close(drawn_there.mean(0) / spread, there.mean(0) / spread, atol=0.08, rtol=0)
        torch.testing.assert_close(drawn_there.std(0) / spread, torch.ones(32), atol=0.06, rtol=0)


def test_params_hold_what_is_trained_and_nothing_of_the_backbone(make_model):
    rng = np.random.default_rng(0)
    head = {"head.1.weight", "head.1.bias", "head.2.weight", "head.2.bias"}
    own = {"none": set(), "prompt": {"prompt"}, "deep": {"deep"}, "pool": {"pool", "query_proj"}}
    for kind, names in own.items():
        model = make_model(kind)
        params = model.init(rng)
        assert set(params) == names | head
        frozen = {weights.untyped_storage().data_ptr() for weights in model.backbone.vit.parameters()}
        assert frozen.isdisjoint(value.untyped_storage().data_ptr() for value in params.values())


def test_the_head_starts_alike_under_every_kind(make_model):
    heads = []
    for kind in ("none", "prompt", "deep", "pool"):
        params = make_model(kind).init(np.random.default_rng(5))
        heads.append({name: value for name, value in params.items() if name.startswith("head.")})
    for head in heads[1:]:
        assert all(torch.equal(head[name], value) for name, value in heads[0].items())


def test_masked_classes_have_no_probability_and_get_no_gradient(make_model, make_batch, images):
    model = make_model("prompt", head=HeadOptions(kind="linear"))
    params = {name: value.requires_grad_() for name, value in stack(drawn(model)).items()}
    allowed = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    domains = torch.tensor([0, 0, 1, 1, 1, 0])  # the groups of COUNTS: domain 0, domain 1, domain 0
    labels = torch.tensor([0, 3, 2, 1, 4, 1])
    losses, output = model.losses(params, make_batch(COUNTS, images=images, mask=allowed[domains], labels=labels))
    chances = output.logits.softmax(1)
    assert torch.equal(chances > 0, allowed[domains])
    losses.sum().backward()
    for client, domain in enumerate((0, 1, 0)):
        moved = params["head.1.weight"].grad[client].abs().amax(1) > 0
        assert torch.equal(moved, allowed[domain])
        assert torch.equal(params["head.1.bias"].grad[client] != 0, allowed[domain])
    assert torch.isfinite(params["prompt"].grad).all()


def test_masks_are_per_sample_within_one_group(make_model, make_batch, images):
    model = make_model("none")
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[1, 2] = mask[4, 0] = mask[5, 4] = False
    params = stack(drawn(model, clients=1))
    with torch.no_grad():
        masked = model.forward(params, make_batch((6,), images=images, mask=mask)).logits
        free = model.forward(params, make_batch((6,), images=images)).logits
    assert torch.equal(masked[mask], free[mask])
    assert torch.isneginf(masked[~mask]).all()


def test_a_groups_loss_is_its_own_mean_over_its_own_samples(make_model, make_batch, images):
    model = make_model("prompt")
    params, labels = drawn(model), torch.tensor([0, 3, 2, 1, 4, 1])
    with torch.no_grad():
        together, _ = model.losses(stack(params), make_batch(COUNTS, images=images, labels=labels))
        start = 0
        for client, count in enumerate(COUNTS):
            own = slice(start, start + count)
            alone = make_batch((count,), images=images[own], labels=labels[own])
            logits = model.forward(stack([params[client]]), alone).logits
            expected = -logits.log_softmax(1)[torch.arange(count), labels[own]].mean()
            torch.testing.assert_close(together[client], expected, atol=1e-5, rtol=1e-5)
            start += count


def test_a_head_on_the_backbones_class_scores(make_vit, make_batch, images):
    backbone = ViT(make_vit(num_classes=9), 28)
    head = HeadOptions(kind="linear", input="logits")
    model = PromptedModel(backbone, PromptOptions(kind="none"), head, classes=5)
    params = drawn(model, clients=1)
    assert params[0]["head.1.weight"].shape == (5, 9)
    logits = model.forward(stack(params), make_batch((6,), images=images)).logits
    scores = backbone.logits(backbone.features_from(backbone.embed((images,)), 0))
    expected = scores @ params[0]["head.1.weight"].T + params[0]["head.1.bias"]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_what_the_backbone_cannot_do_is_refused_in_one_line(make_model, backbone):
    with pytest.raises(InputError, match=r"^prompt\.layer: 3; allowed: 0 to 2 for this backbone$"):
        make_model("prompt", layer=3)
    make_model("none", layer=10)  # a layer means nothing there
    with pytest.raises(InputError, match=r"^head\.input: 'logits'.*have no classifier; allowed: features$"):
        PromptedModel(backbone, PromptOptions(kind="prompt"), HeadOptions(input="logits"), classes=5)
