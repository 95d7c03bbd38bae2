"""The gradient of the fused group, row by row, is each client's own: against plain autograd on one client's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.client.train import GradientOracle
from fedprompt.models.heads.classifier import HeadOptions, dropout_factors
from fedprompt.models.params import stack

COUNTS = (5, 2, 4)
OPENS = torch.tensor([True, False, False])


def plain_feature(vit, tokens, prompts_at):
    """Class feature of tokens [n, T, D]; ``prompts_at`` {block: prompts [n, L, D]} take older ones' place there."""
    standing = 0
    for number, block in enumerate(vit.blocks):
        if number in prompts_at:
            prompts = prompts_at[number]
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1 + standing :]], dim=1)
            standing = prompts.shape[1]
        tokens = block(tokens)
    return vit.norm(tokens)[:, 0]


def plain_loss(model, params, images, labels, keep):
    """One client's loss, from timm's blocks and plain loops over its samples."""
    vit, n = model.backbone.vit, len(images)
    x = (images.permute(0, 3, 1, 2) / 255 - model.backbone._mean) / model.backbone._std
    tokens = torch.cat([vit.cls_token.expand(n, -1, -1), vit.patch_embed(x)], dim=1) + vit.pos_embed
    penalty, at = 0.0, {}
    if "prompt" in params:
        at = {model.kind.layer: params["prompt"].expand(n, -1, -1)}
    elif "deep" in params:
        at = {model.kind.layer + i: prompts.expand(n, -1, -1) for i, prompts in enumerate(params["deep"])}
    elif "pool" in params:
        penalty, prompts = plain_pool(model, params, plain_feature(vit, tokens, {}))
        at = {model.kind.layer: prompts}
    hidden = F.linear(plain_feature(vit, tokens, at), params["head.1.weight"], params["head.1.bias"])
    logits = F.linear(hidden * keep, params["head.2.weight"], params["head.2.bias"])
    return F.cross_entropy(logits, labels) + penalty


def plain_pool(model, params, query):
    """Penalty and prompts [n, k, D] of one client's batch."""
    options, pool = model.kind.options, params["pool"]
    cosine = [[F.cosine_similarity(params["query_proj"] @ q, p, dim=0) for p in pool] for q in query]
    value = np.array([[c.item() for c in row] for row in cosine])
    best = np.argsort(-value, axis=1)[:, : options.top_k]
    if options.selection == "batch":
        votes = np.bincount(best.ravel(), minlength=len(pool))
        order = sorted(range(len(pool)), key=lambda p: (-votes[p], -value[:, p].sum(), p))
        best = np.tile(order[: options.top_k], (len(query), 1))
    mean = sum(cosine[n][p] for n, row in enumerate(best) for p in row) / len(query)
    return options.similarity * mean, torch.stack([pool[list(row)] for row in best])


CASES = {
    "none": {"kind": "none"},
    "prompt": {"kind": "prompt"},
    "prompt in the middle": {"kind": "prompt", "layer": 2},
    "deep": {"kind": "deep"},
    "deep in the middle": {"kind": "deep", "layer": 1},
    "pool by batch": {"kind": "pool", "similarity": 0.1},
    "pool by instance": {"kind": "pool", "selection": "instance", "similarity": -0.1},
    "pool in the middle": {"kind": "pool", "layer": 1},
}


@pytest.fixture
def problem(make_model, make_examples, make_batch):
    """A model, three clients' params, their fused batch, and what each of them has for itself."""

    def make(kind):
        model = make_model(**kind, head=HeadOptions(hidden=16, dropout=0.3))
        params = [model.init(np.random.default_rng(client)) for client in range(3)]
        keep = dropout_factors(torch.tensor([5, 6, 7]), 0, max(COUNTS), 16, 0.3)
        data = [make_examples(n, seed=n, channels=3) for n in COUNTS]
        images = [torch.from_numpy(d.inputs.pixels()) for d in data]
        labels = [torch.from_numpy(d.labels) for d in data]
        batch = make_batch(COUNTS, images=torch.cat(images), labels=torch.cat(labels), keep=keep)
        each = [(params[c], images[c], labels[c], keep[c, :n]) for c, n in enumerate(COUNTS)]
        return model, batch, each

    return make


@pytest.mark.parametrize("kind", CASES.values(), ids=CASES.keys())
def test_every_clients_loss_and_gradient_is_its_own(problem, kind):
    model, batch, each = problem(kind)
    stacked = stack([params for params, *_ in each])
    losses, grads = GradientOracle(model, batch, {}, OPENS).grad(stacked)
    assert losses.shape == (3,)
    assert not losses.requires_grad
    for client, (params, images, labels, keep) in enumerate(each):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        loss = plain_loss(model, leaves, images, labels, keep)
        expected = torch.autograd.grad(loss, list(leaves.values()))
        torch.testing.assert_close(losses[client], loss.detach(), atol=1e-5, rtol=1e-5)
        for name, gradient in zip(leaves, expected, strict=True):
            assert gradient.abs().max() > 1e-4, name
            torch.testing.assert_close(grads[name][client], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", [CASES["prompt"], CASES["pool by batch"]], ids=["prompt", "pool"])
def test_the_loss_alone_is_the_gradients_loss_and_holds_no_graph(problem, kind):
    model, batch, each = problem(kind)
    stacked = stack([params for params, *_ in each])
    oracle = GradientOracle(model, batch, {}, OPENS)
    alone = oracle.loss(stacked)
    selected = oracle.selected
    losses, _ = oracle.grad(stacked)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, losses, atol=1e-6, rtol=1e-6)
    assert (selected is None) == (kind["kind"] == "prompt")
    assert selected is None or torch.equal(selected, oracle.selected)


def test_fixed_params_are_used_and_get_no_gradient(problem):
    model, batch, each = problem(CASES["prompt"])
    stacked = stack([params for params, *_ in each])
    expected_losses, expected = GradientOracle(model, batch, {}, OPENS).grad(stacked)
    head = {name: value for name, value in stacked.items() if name.startswith("head.")}
    losses, grads = GradientOracle(model, batch, {"prompt": stacked["prompt"]}, OPENS).grad(head)
    assert set(grads) == set(head)
    torch.testing.assert_close(losses, expected_losses)
    for name in head:
        torch.testing.assert_close(grads[name], expected[name])


def test_a_question_changes_neither_params_nor_the_next_answer(problem):
    model, batch, each = problem(CASES["deep"])
    stacked = stack([params for params, *_ in each])
    before = {name: value.clone() for name, value in stacked.items()}
    oracle = GradientOracle(model, batch, {}, OPENS)
    first, second = oracle.grad(stacked), oracle.grad(stacked)
    for name, value in before.items():
        assert torch.equal(stacked[name], value)
        assert not stacked[name].requires_grad
        assert torch.equal(first[1][name], second[1][name])
