"""The prompt pool: who is selected, and what the penalty is.

With ``query_proj`` the identity and prompt k along axis k, a query of length one *is* its list of similarities.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.models.params import stack


def queries(*rows) -> torch.Tensor:
    """Queries [M, 32] of length one whose similarities to the first prompts are ``rows``."""
    out = torch.zeros(len(rows), 32)
    for query, row in zip(out, rows, strict=True):
        query[: len(row)] = torch.tensor(row)
        query[31] = math.sqrt(max(0.0, 1 - sum(s * s for s in row)))
    return out


def select(model, batch, clients: int = 1):
    """Features, penalty and selected prompts with a pool along the axes, as long as it is numbered."""
    length = torch.arange(1, model.kind.options.pool_size + 1)[:, None]  # similarity must not depend on it
    params = {"pool": 0.5 * length * torch.eye(32)[: len(length)], "query_proj": torch.eye(32)}
    with torch.no_grad():
        return model.kind.features(stack([params] * clients), batch)


def tokens_for(count: int) -> torch.Tensor:
    return torch.randn(count, 17, 32, generator=torch.Generator().manual_seed(count))


def chosen(model, make_batch, counts, query) -> list[list[int]]:
    batch = make_batch(counts, tokens=tokens_for(len(query)), query=query)
    selected = select(model, batch, len(counts))[2]
    return [row.nonzero().flatten().tolist() for row in selected]


def test_without_a_projection_the_query_itself_is_compared(make_model, make_batch):
    batch = make_batch((3,), tokens=tokens_for(3), query=queries((0.5, 0.25), (0.5, 0.75), (0.1, 0.9)))
    with_identity = select(make_model("pool", top_k=2), batch)
    model = make_model("pool", top_k=2, query="identity")
    params = {"pool": torch.arange(1, model.kind.options.pool_size + 1)[:, None] * torch.eye(32)[:6] * 0.5}
    assert set(model.kind.init(np.random.default_rng(0))) == {"pool"}
    with torch.no_grad():
        alone = model.kind.features(stack([params]), batch)
    for found, expected in zip(alone, with_identity, strict=True):
        torch.testing.assert_close(found, expected)


CASES = {
    "most votes beat the larger sum": ([(0.2, 0.1), (0.2, 0.1), (0.0, 0.9)], 1, [0]),
    "equal votes: the larger sum": ([(0.3, 0.1), (0.1, 0.9)], 1, [1]),
    "equal votes and sums: the lower index": ([(0.25, 0.5, 0.0), (0.5, 0.25, 0.0)], 1, [0]),
    "a tie at the last place only": ([(0.5, 0.25, 0.125), (0.5, 0.125, 0.25)], 2, [0, 1]),
    "equal similarities of one sample: the lower index": ([(0.0, 0.5, 0.5, 0.5)], 2, [1, 2]),
    "no votes at all: the larger sum fills up": ([(0.5, -0.5, -0.1, -0.2)], 1, [0]),
    "negative similarities are ordered too": ([(-0.5, -0.1, -0.2, -0.4, -0.3, -0.6)], 2, [1, 2]),
}


@pytest.mark.parametrize(("rows", "k", "expected"), CASES.values(), ids=CASES.keys())
def test_the_batch_votes(make_model, make_batch, rows, k, expected):
    model = make_model("pool", top_k=k)
    assert chosen(model, make_batch, (len(rows),), queries(*rows)) == [expected]


def test_ties_are_decided_after_the_vote_not_before(make_model, make_batch):
    """Prompt 2 has the largest sum, but nobody's vote."""
    rows = [(0.6, 0.1, 0.5), (0.1, 0.6, 0.5)]
    assert chosen(make_model("pool", top_k=1), make_batch, (2,), queries(*rows)) == [[0]]


@pytest.mark.parametrize("k", [1, 3, 5])
def test_voting_equals_counting_by_hand_on_ragged_groups(make_model, make_batch, k):
    rng, counts = np.random.default_rng(k), (5, 1, 4, 16, 6, 2, 6, 8, 3)
    rows = rng.uniform(-0.4, 0.4, (sum(counts), 6))
    got = chosen(make_model("pool", top_k=k), make_batch, counts, queries(*rows.tolist()))
    ties, start = 0, 0
    for group, count in enumerate(counts):
        mine = rows[start : start + count]
        votes = np.zeros(6, dtype=int)
        for row in mine:
            votes[sorted(range(6), key=lambda p: (-row[p], p))[:k]] += 1
        order = sorted(range(6), key=lambda p: (-votes[p], -mine[:, p].sum(), p))
        assert got[group] == sorted(order[:k])
        ties += votes[order[k - 1]] == votes[order[k]]
        start += count
    assert ties >= 2  # the case has been met


def test_padding_does_not_vote(make_model, make_batch):
    """The short group's similarities are all negative: zeros in the places that it does not fill would win."""
    model = make_model("pool", top_k=1)
    short, long = [(-0.9, -0.1, -0.2)], [(0.5,)] * 7
    assert chosen(model, make_batch, (7, 1), queries(*long, *short))[1] == [3]  # prompts 3 to 5: similarity 0
    every = [(-0.9, -0.1, -0.2, -0.3, -0.3, -0.3)]
    assert chosen(model, make_batch, (7, 1), queries(*long, *every))[1] == [1]
    assert chosen(model, make_batch, (1, 7), queries(*every, *long))[0] == [1]


def test_groups_do_not_vote_for_each_other(make_model, make_batch):
    rows = [(0.9, 0.1)] * 3 + [(0.1, 0.0, 0.5)] * 2
    assert chosen(make_model("pool", top_k=1), make_batch, (3, 2), queries(*rows)) == [[0], [2]]


@pytest.mark.parametrize("selection", ["batch", "instance"])
def test_more_prompts_wanted_than_the_pool_has_means_all(make_model, make_batch, selection):
    model = make_model("pool", top_k=50, selection=selection)
    batch = make_batch((2,), tokens=tokens_for(2), query=queries((0.5, 0.1), (0.1, 0.5)))
    features, penalty, selected = select(model, batch)
    assert selected.all()
    assert penalty.item() == pytest.approx(0.01 * 0.6)
    assert torch.isfinite(features).all()


def test_every_instance_has_its_own_prompts_and_the_mask_is_their_union(make_model, make_batch):
    model = make_model("pool", top_k=2, selection="instance")
    rows = [(0.6, 0.1, 0.5), (0.1, 0.6, 0.5), (0.0, 0.3, 0.0, 0.7)]
    batch = make_batch((2, 1), tokens=tokens_for(3), query=queries(*rows))
    features, penalty, selected = select(model, batch, clients=2)
    assert selected.int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]
    assert penalty.tolist() == pytest.approx([0.01 * (1.1 + 1.1) / 2, 0.01 * 1.0])
    pool = 0.5 * torch.arange(1, 7)[:, None] * torch.eye(32)[:6]
    for sample, prompts in enumerate([[0, 2], [1, 2], [3, 1]]):
        expected = run_with(model, batch.tokens.values[sample], pool[prompts])
        torch.testing.assert_close(features[sample], expected, atol=1e-5, rtol=1e-4)


def run_with(model, tokens, prompts):
    """Class feature of one sample [T, D] with the given prompts."""
    vit = model.backbone.vit
    return vit.norm(vit.blocks(torch.cat([tokens[:1], prompts, tokens[1:]])[None]))[0, 0]


def test_the_whole_batch_runs_with_the_winners(make_model, make_batch):
    model = make_model("pool", top_k=2)
    rows = [(0.6, 0.1, 0.5), (0.1, 0.2, 0.7), (0.0, 0.3, 0.0, 0.7)]  # votes: 1, 2, 2, 1
    batch = make_batch((3,), tokens=tokens_for(3), query=queries(*rows))
    features, penalty, selected = select(model, batch)
    assert selected.int().tolist() == [[0, 1, 1, 0, 0, 0]]
    assert penalty.item() == pytest.approx(0.01 * (0.1 + 0.5 + 0.2 + 0.7 + 0.3 + 0.0) / 3)
    pool = 0.5 * torch.arange(1, 7)[:, None] * torch.eye(32)[:6]
    for sample in range(3):
        expected = run_with(model, batch.tokens.values[sample], pool[[2, 1]])  # more similar in sum, so first
        torch.testing.assert_close(features[sample], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.01, -0.5, 0.0])
def test_the_penalty_is_signed_and_a_step_against_its_gradient_moves_prompts_accordingly(
    make_model, make_batch, factor
):
    model = make_model("pool", similarity=factor, top_k=2)
    rng = np.random.default_rng(0)
    params = stack([model.init(rng)])
    query = torch.from_numpy(rng.normal(size=(4, 32)).astype(np.float32))
    batch = make_batch((4,), tokens=tokens_for(4), query=query)

    def mean_similarity(pool, selected):
        projected = query @ params["query_proj"][0].T
        return F.cosine_similarity(projected[:, None], pool[selected][None], dim=-1).sum(1).mean()

    pool = params["pool"].requires_grad_()
    _, penalty, selected = model.kind.features({**params, "pool": pool}, batch)
    before = mean_similarity(pool[0], selected[0])
    assert penalty.item() == pytest.approx(factor * before.item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty.sum(), pool)
    after = mean_similarity(pool[0] - 0.01 * gradient[0] / max(abs(factor), 1e-9), selected[0])
    assert np.sign((after - before).item()) == -np.sign(factor)  # λ > 0 pushes away from the queries, as in PFPT
    assert not gradient[0, ~selected[0]].any()


def test_the_penalty_is_part_of_the_loss(make_model, make_batch):
    rng = np.random.default_rng(0)
    plain, pushed = make_model("pool", similarity=0.0), make_model("pool", similarity=0.3)
    params = stack([plain.init(rng)] * 2)
    query = torch.from_numpy(rng.normal(size=(5, 32)).astype(np.float32))
    batch = make_batch((2, 3), tokens=tokens_for(5), query=query)
    without, _ = plain.losses(params, batch)
    with_penalty, output = pushed.losses(params, batch)
    assert output.penalty.abs().min() > 1e-3
    torch.testing.assert_close(with_penalty - without, output.penalty, atol=1e-5, rtol=1e-4)
