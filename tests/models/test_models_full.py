"""Full fine-tuning: every weight gets its gradient, and the frozen backbone is only a shape."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

from fedprompt.client.evaluate import predict
from fedprompt.client.examples import prepare
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

VARIANTS = {
    "plain": {},
    "layer scale, register tokens, norm before the blocks": {"init_values": 0.5, "reg_tokens": 2, "pre_norm": True},
    "own classifier, norms in attention": {"num_classes": 7, "qk_norm": True, "scale_attn_norm": True},
}


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(backbone) -> PromptedModel:
    return PromptedModel(backbone, PromptOptions(kind="full"), HeadOptions(hidden=16), 5)


def moved(model: PromptedModel, seed: int) -> dict[str, torch.Tensor]:
    """A client's params some way from the start."""
    noise = torch.Generator().manual_seed(seed)
    start = model.init(np.random.default_rng(seed))
    return {name: value + 0.05 * torch.randn(value.shape, generator=noise) for name, value in start.items()}


def gradients(model, params, batch):
    """One client's loss [1] and its gradients, as local training asks for them."""
    leaves = {name: value.requires_grad_() for name, value in stack([params]).items()}
    losses, _ = model.losses(leaves, batch)
    return losses.detach(), dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))


def test_the_start_is_a_copy_of_the_pretrained_weights_and_draws_nothing(make_vit):
    backbone = ViT(make_vit(num_classes=7), 28)
    model = PromptedModel(backbone, PromptOptions(kind="full", layer=10), HeadOptions(), 5)  # a layer means nothing
    rng = np.random.default_rng(0)
    params = model.kind.init(rng)
    assert rng.random() == np.random.default_rng(0).random()
    weights = {f"backbone.{name}": value for name, value in backbone.vit.named_parameters()}
    assert weights.keys() - params.keys() == {"backbone.head.weight", "backbone.head.bias"}
    for name, value in params.items():
        assert torch.equal(value, weights[name])
        assert not value.requires_grad
        assert value.untyped_storage().data_ptr() != weights[name].untyped_storage().data_ptr()


def test_the_kind_says_that_clients_cannot_be_fused_and_others_say_that_they_can(make_model):
    fusable = {kind: make_model(kind).kind.fusable for kind in ("none", "prompt", "deep", "pool", "adapter", "lora")}
    assert all(fusable.values())
    full = make_model("full").kind
    assert (full.fusable, full.layer, full.needs_query) == (False, 0, False)


def test_at_the_start_the_features_are_the_backbones(model, make_batch, images):
    got, penalty, selected = model.kind.features(
        stack([model.init(np.random.default_rng(0))]), make_batch((4,), images=images)
    )
    expected = model.backbone.features_from(model.backbone.embed((images,)), 0)
    assert torch.equal(got, expected)
    assert torch.equal(penalty, torch.zeros(1))
    assert selected is None


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_features_and_gradients_equal_autograd_through_a_plain_copy(make_vit, make_batch, images, changes):
    backbone = ViT(make_vit(seed=2, **changes), 28)
    model = PromptedModel(backbone, PromptOptions(kind="full"), HeadOptions(), 5)
    client = {name: value for name, value in moved(model, 3).items() if name.startswith("backbone.")}
    plain = copy.deepcopy(backbone.vit)
    for name, value in client.items():
        plain.get_parameter(name.removeprefix("backbone.")).data.copy_(value)
    plain.requires_grad_(True)
    mean, std = (torch.tensor(backbone.vit.pretrained_cfg[key]) for key in ("mean", "std"))
    pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = plain.forward_head(plain.forward_features(pixels), pre_logits=True)
    direction = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    (expected * direction).sum().backward()

    leaves = {name: value[None].clone().requires_grad_() for name, value in client.items()}
    got = model.kind.features(leaves, make_batch((4,), images=images))[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for name, grad in zip(leaves, torch.autograd.grad((got * direction).sum(), list(leaves.values())), strict=True):
        own = plain.get_parameter(name.removeprefix("backbone.")).grad
        assert own.abs().max() > 0, name
        torch.testing.assert_close(grad[0], own, atol=5e-4, rtol=1e-3)


def test_a_step_lowers_the_loss_and_leaves_the_frozen_backbone_alone(model, make_batch, images):
    frozen = {name: value.clone() for name, value in model.backbone.vit.state_dict().items()}
    batch = make_batch((4,), images=images, labels=torch.tensor([0, 1, 2, 3]))
    params = model.init(np.random.default_rng(0))
    loss, grads = gradients(model, params, batch)
    stepped = {name: p - 0.01 * grads[name][0] if "backbone" in name else p for name, p in params.items()}
    assert gradients(model, stepped, batch)[0] < loss - 1e-3
    before, after = (model.kind.features(stack([p]), batch)[0] for p in (params, stepped))
    assert not torch.allclose(after, before, atol=1e-3)
    for name, value in model.backbone.vit.state_dict().items():
        assert torch.equal(value, frozen[name])
        assert not value.is_meta
    assert all(weights.grad is None and not weights.requires_grad for weights in model.backbone.vit.parameters())


def test_several_groups_are_evaluated_with_the_one_set_of_params(model, make_examples):
    client, examples = moved(model, 1), make_examples(7)
    prepared = prepare(model, examples, keep_tokens=True)
    assert prepared.inputs is not None
    assert prepared.tokens is None
    by_threes = predict(model, client, prepared, batch_size=3)
    at_once = predict(model, client, prepared, batch_size=7)
    np.testing.assert_allclose(by_threes.losses, at_once.losses, atol=1e-5)
    assert not np.allclose(predict(model, moved(model, 2), prepared, batch_size=3).losses, at_once.losses, atol=1e-2)


def test_clients_with_weights_of_their_own_are_not_taken_as_one_batch(model, make_batch, images):
    params = stack([moved(model, 1), moved(model, 2)])
    with pytest.raises(ValueError, match="one client at a time"):
        model.losses(params, make_batch((2, 2), images=images))


def test_threads_that_train_side_by_side_give_what_they_give_one_after_the_other(model, make_batch, images):
    clients, rounds = [moved(model, seed) for seed in range(3)], 6
    batch = make_batch((4,), images=images, labels=torch.tensor([0, 1, 2, 3]))
    alone = [gradients(model, client, batch) for client in clients]
    found = [[] for _ in clients]
    together = threading.Barrier(len(clients), timeout=30)

    def train(number: int) -> None:
        for _ in range(rounds):
            together.wait()
            found[number].append(gradients(model, clients[number], batch))

    threads = [threading.Thread(target=train, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (loss, grads), mine in zip(alone, found, strict=True):
        assert len(mine) == rounds
        for other_loss, other_grads in mine:
            torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other_grads, grads, atol=1e-4, rtol=1e-3)


def test_the_head_can_read_the_backbones_own_frozen_classifier(make_vit, make_batch, images):
    backbone = ViT(make_vit(num_classes=7), 28)
    model = PromptedModel(backbone, PromptOptions(kind="full"), HeadOptions(kind="linear", input="logits"), 5)
    params, batch = moved(model, 0), make_batch((4,), images=images)
    feature = model.kind.features(stack([params]), batch)[0]
    scores = feature @ backbone.vit.head.weight.T + backbone.vit.head.bias
    expected = scores @ params["head.1.weight"].T + params["head.1.bias"]
    torch.testing.assert_close(model.forward(stack([params]), batch).logits, expected, atol=1e-4, rtol=1e-4)
    grads = gradients(model, params, batch)[1]
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_bfloat16_gives_float32_features_and_gradients_near_the_exact_ones(model, make_vit, make_batch, images):
    rough = PromptedModel(ViT(make_vit(), 28, autocast=torch.bfloat16), PromptOptions("full"), model.head.options, 5)
    client, batch = moved(model, 0), make_batch((4,), images=images)
    exact, near = (m.kind.features(stack([client]), batch)[0] for m in (model, rough))
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().mean() / exact.abs().mean() < 0.05
    for name, grad in gradients(rough, client, batch)[1].items():
        assert grad.dtype == torch.float32
        assert torch.isfinite(grad).all(), name
