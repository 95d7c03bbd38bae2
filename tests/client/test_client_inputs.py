"""Another form of inputs and another backbone: token ids of ragged length, and a small encoder that reads a mask.

They stand for language models. Nothing in the core knows of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedprompt.client.batches import Arrays
from fedprompt.client.evaluate import predict
from fedprompt.client.examples import Examples, prepare, token_bytes
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Hollow, Tokens
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

WORDS, WIDTH, LONGEST = 30, 16, 9
KINDS = [("none", 0), ("prompt", 0), ("prompt", 1), ("deep", 0), ("deep", 1), ("pool", 0), ("pool", 1), ("full", 0)]


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """Token ids of ragged length: one flat array, and where each text begins and ends."""

    flat: np.ndarray
    ends: np.ndarray  # [n, 2]

    @classmethod
    def of(cls, texts):
        offsets = np.cumsum([0, *map(len, texts)])
        return cls(
            np.concatenate([np.asarray(text, np.int64) for text in texts]), np.stack([offsets[:-1], offsets[1:]], 1)
        )

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, at):
        return TokenInputs(self.flat, self.ends[at])

    @property
    def shape(self):
        return ()

    def texts(self):
        return [self.flat[start:end] for start, end in self.ends]

    def arrays(self):
        lengths = self.ends[:, 1] - self.ends[:, 0]
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate(self.texts())
        return ids, mask

    def copied(self):
        return self.of(self.texts())

    def shared(self):
        return None

    def hash_into(self, state):
        for text in self.texts():
            state.update(memoryview(text.copy()))

    @classmethod
    def concatenate(cls, parts):
        return cls.of([text for part in parts for text in part.texts()])


class Encoder:
    """Embeddings with positions, two pre-norm blocks that look at no padding, and the mean of a text's own tokens."""

    width, depth, classes, prefix, prompt_position, prompt_bound = WIDTH, 2, 0, 0, 0, 0.5
    tokens_per_sample, fusable, device = LONGEST, True, torch.device("cpu")

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = {"batch_first": True, "dropout": 0.0, "norm_first": True}
        self.net = nn.ModuleDict(
            {
                "words": nn.Embedding(WORDS, WIDTH),
                "places": nn.Embedding(LONGEST, WIDTH),
                "blocks": nn.ModuleList(
                    [nn.TransformerEncoderLayer(WIDTH, 2, 32, **layers) for _ in range(self.depth)]
                ),
            }
        )
        self.net.eval().requires_grad_(False)

    @property
    def blocks(self):
        return self.net["blocks"]

    @property
    def bytes(self):
        return sum(4 * p.numel() for p in self.weights().values())

    def embed(self, inputs):
        ids, mask = inputs
        return Tokens(self.net["words"](ids) + self.net["places"](torch.arange(ids.shape[1])), mask)

    def run(self, tokens, first, last):
        x = tokens.values
        for block in self.net["blocks"][first:last]:
            y = block.norm1(x)
            ignored = None if tokens.mask is None else ~tokens.mask
            x = x + block.self_attn(y, y, y, key_padding_mask=ignored, need_weights=False)[0]
            x = x + block.linear2(block.activation(block.linear1(block.norm2(x))))
        return tokens.having(x)

    def read_out(self, tokens):
        own = tokens.without_prompts(0)
        weights = own.mask[..., None].float()
        return (own.values * weights).sum(1) / weights.sum(1)

    def features_from(self, tokens, first, changes=None):
        return self.read_out(self.run(tokens, first, self.depth))

    def changeable_from(self, first):
        return False

    def weights(self):
        return dict(self.net.named_parameters())

    def hollow(self):
        return Hollow(self, "net")


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


def sentences(count: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, WORDS, rng.integers(1, LONGEST + 1)) for _ in range(count)]
    return Examples(rng.integers(0, 3, count), np.zeros(count, np.int64), TokenInputs.of(texts))


def model_of(encoder: Encoder, kind: str, layer: int) -> PromptedModel:
    options = PromptOptions(kind, length=3, layer=layer, pool_size=5, top_k=2, selection="instance")
    return PromptedModel(encoder, options, HeadOptions(hidden=8, dropout=0.0), 3)


def logits(model: PromptedModel, examples: Examples, at: list[int]) -> Tensor:
    """Class scores of some samples as one batch."""
    params = stack([model.init(np.random.default_rng(0))])
    batch = Arrays([examples], None, model.device).batch(
        torch.tensor(at), torch.zeros(len(at), dtype=torch.int64), torch.arange(len(at)), (len(at),), None
    )
    with torch.no_grad():
        return model.forward(params, batch).logits


@pytest.mark.parametrize(("kind", "layer"), KINDS)
def test_padding_changes_no_number(encoder, kind, layer):
    model, examples = model_of(encoder, kind, layer), sentences(8, 0)
    prepared = prepare(model, examples, keep_tokens=True)
    together = logits(model, prepared, list(range(8)))
    for i in range(8):  # alone a text is not padded, or all prepared tokens are
        torch.testing.assert_close(logits(model, examples, [i])[0], together[i], atol=1e-5, rtol=1e-5)


def test_kept_tokens_have_a_mask_and_parts_of_any_length_stand_together(encoder):
    model = model_of(encoder, "prompt", 1)
    short = replace(sentences(2, 1), inputs=TokenInputs.of([[3], [4, 5]]))
    parts = [prepare(model, examples, keep_tokens=True) for examples in (short, sentences(70, 2))]
    joined = Examples.concatenate(parts)
    assert parts[0].tokens.shape == (2, 2, WIDTH)
    assert joined.tokens.shape == (72, LONGEST, WIDTH)
    assert joined.token_mask[:2].sum(1).tolist() == [1, 2]
    assert joined.tokens.nbytes == 72 * token_bytes(model)
    assert joined.inputs is None
    of_both = Examples.concatenate([short, sentences(70, 2)])
    torch.testing.assert_close(
        logits(model, joined, [0, 1, 40]), logits(model, of_both, [0, 1, 40]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("kind", "layer"), [case for case in KINDS if case[0] != "full"])
def test_clients_with_texts_train_together_as_they_do_alone(encoder, kind, layer):
    model = model_of(encoder, kind, layer)
    start = model.init(np.random.default_rng(0))
    data = [prepare(model, sentences(n, n), keep_tokens=layer == 1) for n in (11, 7)]
    training = Training(make_rule(LocalOptions(optimizer="sgd", lr=0.1, prompt_lr=0.1)), 4, lambda name: True, 0, 1)
    tasks = [Task(client, start, 2) for client in range(2)]
    together = train_group(model, tasks, data, training)
    for task, own, update in zip(tasks, data, together, strict=True):
        (alone,) = train_group(model, [task], [own], training)
        for name, value in alone.params.items():
            torch.testing.assert_close(update.params[name], value, atol=1e-5, rtol=1e-4)
            assert not torch.equal(value, start[name])
    assert len(predict(model, together[0].params, data[1], 4).predicted) == 7


def test_a_picture_cannot_be_added_to_texts(encoder):
    with pytest.raises(InputError, match=r"^prompt\.kind: 'visual' .* allowed: none, prompt, deep, pool, "):
        model_of(encoder, "visual", 0)
