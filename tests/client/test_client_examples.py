"""What is computed beforehand gives what computing it from the images gives, and nothing is kept in vain."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from fedprompt.client.batches import Arrays
from fedprompt.client.examples import CHUNK, Examples, has_tokens_to_keep, prepare, token_bytes
from fedprompt.models.params import stack

N = CHUNK + 6  # more than one chunk, the last one short

LAYERS = [("none", 0), ("prompt", 0), ("prompt", 2), ("deep", 0), ("deep", 1), ("pool", 0), ("pool", 2)]


def held(examples: Examples) -> set[str]:
    return {f.name for f in fields(examples) if getattr(examples, f.name) is not None} - {"labels", "domains"}


def logits(model, examples):
    params = stack([model.init(np.random.default_rng(0))])
    at = torch.arange(len(examples))
    batch = Arrays([examples], None, torch.device("cpu")).batch(at, torch.zeros_like(at), at, (len(examples),), None)
    with torch.no_grad():
        return model.forward(params, batch).logits


@pytest.mark.parametrize(("kind", "layer"), LAYERS)
@pytest.mark.parametrize("keep_tokens", [True, False])
def test_prepared_examples_say_what_the_images_say(make_model, make_examples, kind, layer, keep_tokens):
    model = make_model(kind, layer=layer)
    raw = make_examples(N, size=12)
    prepared = prepare(model, raw, keep_tokens)
    assert (prepared.labels == raw.labels).all()
    assert (prepared.domains == raw.domains).all()
    torch.testing.assert_close(logits(model, prepared), logits(model, raw), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layer", "keep_tokens", "expected"),
    [
        ("none", 0, True, {"query"}),  # no block runs in training, so the images are let go
        ("none", 0, False, {"query"}),
        ("prompt", 0, True, {"inputs"}),
        ("prompt", 2, True, {"tokens"}),
        ("prompt", 2, False, {"inputs"}),
        ("deep", 1, True, {"tokens"}),
        ("pool", 0, True, {"inputs", "query"}),
        ("pool", 2, True, {"tokens", "query"}),
        ("pool", 2, False, {"inputs", "query"}),
    ],
)
def test_what_is_held_after_preparing(make_model, make_examples, kind, layer, keep_tokens, expected):
    assert held(prepare(make_model(kind, layer=layer), make_examples(5), keep_tokens)) == expected


def test_tokens_and_query_are_the_plain_backbones(make_model, make_examples):
    model = make_model("pool", layer=2)
    raw = make_examples(N)
    prepared = prepare(model, raw, True)
    backbone, images = model.backbone, torch.from_numpy(raw.inputs.pixels())
    tokens = backbone.run(backbone.embed((images,)), 0, 2)
    assert prepared.tokens.dtype == prepared.query.dtype == np.float32
    assert prepared.tokens.nbytes == N * token_bytes(model)
    np.testing.assert_allclose(prepared.tokens, tokens.values.numpy(), atol=1e-5)
    np.testing.assert_allclose(prepared.query, backbone.features_from(tokens, 2).numpy(), atol=1e-5)


@pytest.mark.parametrize(("kind", "layer"), LAYERS)
def test_tokens_are_worth_keeping_only_between_the_ends(make_model, kind, layer):
    model = make_model(kind, layer=layer)
    between = kind != "none" and layer > 0
    assert has_tokens_to_keep(model) == between
    assert token_bytes(model) == (17 * 32 * 4 if between else 0)


def test_preparing_accepts_read_only_images(make_model, make_examples, recwarn):
    raw = make_examples(5)
    raw.inputs.array.flags.writeable = False
    prepare(make_model("pool"), raw, True)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_a_concatenation_taken_apart_is_what_it_was(make_model, make_examples):
    model = make_model("pool", layer=1)
    parts = [prepare(model, make_examples(n, seed=n), True) for n in (4, 1, 6)]
    joined = Examples.concatenate(parts)
    assert len(joined) == 11
    for start, part in zip((0, 4, 5), parts, strict=True):
        again = joined.take(np.arange(start, start + len(part)))
        for name in ("labels", "domains", "tokens", "query"):
            assert (getattr(again, name) == getattr(part, name)).all()
        assert again.inputs is None


def test_taking_follows_the_indices_and_copies(make_examples):
    examples = replace(make_examples(6), query=np.arange(12.0).reshape(6, 2))
    taken = examples.take(np.array([4, 0, 4]))
    assert taken.query[:, 0].tolist() == [8, 0, 8]
    assert (taken.inputs.pixels() == examples.inputs.pixels()[[4, 0, 4]]).all()
    assert taken.labels.tolist() == examples.labels[[4, 0, 4]].tolist()
    taken.query[:] = -1
    assert examples.query.min() == 0


def test_parts_with_only_their_query_can_be_joined(make_model, make_examples):
    model = make_model("none")
    parts = [prepare(model, make_examples(n), True) for n in (3, 4)]
    joined = Examples.concatenate(parts)
    assert held(joined) == {"query"}
    assert (joined.query == np.concatenate([part.query for part in parts])).all()


def test_what_only_some_parts_hold_is_dropped_while_images_remain(make_model, make_examples):
    raw = make_examples(4)
    prepared = prepare(make_model("pool"), raw, True)
    assert held(Examples.concatenate([raw, prepared])) == {"inputs"}


@pytest.mark.parametrize(("kind", "layer"), [("prompt", 2), ("pool", 2), ("none", 0)])
def test_parts_that_share_neither_images_nor_tokens_are_refused(make_model, make_examples, kind, layer):
    raw = make_examples(4)
    prepared = prepare(make_model(kind, layer=layer), raw, True)
    with pytest.raises(ValueError, match="cannot be one batch"):
        Examples.concatenate([raw, prepared])
    if kind == "pool":
        with pytest.raises(ValueError, match="cannot be one batch"):
            Examples.concatenate([prepared, replace(raw, query=prepared.query)])
