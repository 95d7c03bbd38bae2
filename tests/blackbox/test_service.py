"""The black box: what it answers, what it counts, when it refuses, and what it does not show."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedprompt.blackbox.batching import AT_ONCE, Answers, Batcher, Desk
from fedprompt.blackbox.client import ImageOptions, ServedModel
from fedprompt.blackbox.service import EVALUATION, Ledger, LocalService, Scorer, digest
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.errors import InputError, OutOfBudget
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.prototypes import prototype_scores
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

PROTOTYPES = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
OPTIONS = ImageOptions(image_size=28, crop=1.0, channels=4, strength=0.5)


@pytest.fixture
def scorer(backbone):
    return Scorer(backbone, PROTOTYPES, HeadOptions(kind="prototypes", scale=10.0))


def pixels(n, seed=0):
    return np.random.default_rng([n, seed]).random((n, 3, 28, 28), dtype=np.float32)


# --- the ledger


def test_every_image_is_a_query_of_the_client_that_asks():
    ledger = Ledger()
    for client, images, request in ((3, 16, (1, 0)), (3, 4, (1, 1)), (7, 5, (1, 0)), (EVALUATION, 100, (0, 0))):
        ledger.admit(client, images, request, b"a")
    assert ledger.counts() == {3: 20, 7: 5, EVALUATION: 100}


def test_a_request_that_is_repeated_counts_once_even_where_the_budget_is_used_up():
    ledger = Ledger(budget=20)
    for _ in range(3):
        ledger.admit(3, 16, (1, 0), b"a")
    ledger.admit(3, 4, (1, 1), b"a")
    ledger.admit(3, 16, (1, 0), b"a")
    assert ledger.counts() == {3: 20}


def test_the_same_numbers_in_another_round_are_another_request():
    ledger = Ledger()
    for round in (1, 2, 2, 3):
        ledger.admit(3, 16, (round, 0), b"a")
    assert ledger.counts() == {3: 48}


def test_a_number_that_is_repeated_with_other_images_is_another_request():
    ledger, answered = Ledger(budget=30), 0
    for content in (b"a", b"b", b"a", b"c", b"d"):
        try:
            ledger.admit(3, 10, (1, 0), content)
            answered += 1
        except OutOfBudget:
            pass
    assert answered == 4  # a, b, a again and c
    assert ledger.counts() == {3: 30}


def test_equal_images_have_one_digest_and_the_smallest_change_has_another():
    images = pixels(4)
    changed = images.copy()
    changed[3, 2, 27, 27] = np.nextafter(changed[3, 2, 27, 27], np.float32(2))
    assert digest(images) == digest(images.copy()) == digest(np.asfortranarray(images))
    assert len({digest(images), digest(changed), digest(images[:3]), digest(images[::-1])}) == 4


def test_evaluation_has_a_budget_of_its_own_that_ends_a_run():
    ledger = Ledger(budget=10, evaluation=100)
    ledger.admit(EVALUATION, 90, (0, 0), b"a")
    with pytest.raises(InputError, match="evaluation has asked 90 queries; allowed: 100"):
        ledger.admit(EVALUATION, 11, (1, 0), b"b")
    ledger.admit(3, 10, (1, 0), b"a")
    assert ledger.counts() == {EVALUATION: 90, 3: 10}


def test_a_ledger_knows_the_newest_requests_alone(monkeypatch):
    monkeypatch.setattr("fedprompt.blackbox.service.REMEMBERED", 2)
    ledger = Ledger()
    for number in (0, 1, 0, 2, 0, 1):  # 1 was forgotten when 2 came
        ledger.admit(3, 10, (1, number), b"a")
    assert ledger.counts() == {3: 40}


def test_beyond_its_budget_a_client_is_refused_in_one_line_and_others_are_not():
    ledger = Ledger(budget=40)
    ledger.admit(3, 30, (1, 0), b"a")
    with pytest.raises(OutOfBudget, match="client 3 has asked 30 of its 40 queries; 16 more are refused") as refusal:
        ledger.admit(3, 16, (1, 1), b"a")
    assert "\n" not in str(refusal.value)
    ledger.admit(3, 10, (1, 2), b"a")
    ledger.admit(4, 40, (1, 0), b"a")
    ledger.admit(EVALUATION, 1000, (1, 0), b"a")
    assert ledger.counts() == {3: 40, 4: 40, EVALUATION: 1000}


def test_threads_that_ask_at_once_get_exactly_the_budget():
    ledger, refused, start = Ledger(budget=500), [], threading.Barrier(8)

    def ask(worker):
        start.wait()
        for number in range(100):
            try:
                ledger.admit(3, 1, (1, worker, number), b"a")
            except OutOfBudget:
                refused.append(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert ledger.counts() == {3: 500}
    assert len(refused) == 300


def test_to_resume_makes_no_count_less():
    ledger = Ledger(budget=40)
    ledger.admit(3, 30, (1, 0), b"a")
    ledger.resume({3: 5, 4: 7})
    assert ledger.counts() == {3: 30, 4: 7}


def test_a_resumed_count_goes_on():
    ledger = Ledger(budget=40)
    ledger.resume({3: 30})
    with pytest.raises(OutOfBudget):
        ledger.admit(3, 11, (5, 0), b"a")
    ledger.admit(3, 10, (5, 0), b"a")
    assert ledger.counts() == {3: 40}


# --- the model behind it


def test_scores_are_the_log_probabilities_of_cosines_with_the_prototypes(scorer, backbone):
    images = pixels(6)
    features = backbone.features_from(backbone.embed_pixels(torch.from_numpy(images)), 0)
    expected = F.log_softmax(prototype_scores(features, PROTOTYPES, 10.0), dim=1)
    scores = LocalService(scorer, Ledger()).scores(0, images, (1, 0))
    assert scores.shape == (6, 5)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-5)


def test_nothing_but_scores_and_counts_can_be_had_of_a_service(scorer):
    service = LocalService(scorer, Ledger())
    public = {name for name in dir(service) if not name.startswith("_")}
    assert public == {"scores", "counts", "model_bytes", "resume"}
    answers = [service.scores(0, pixels(2), (1, 0)), service.counts(), service.model_bytes()]
    assert [type(answer) for answer in answers] == [np.ndarray, dict, int]
    assert not any(isinstance(value, torch.Tensor) for value in vars(service).values())


def test_through_the_service_a_client_sees_what_the_white_box_says(scorer, backbone, make_batch):
    head = HeadOptions(kind="prototypes", scale=10.0)
    white = PromptedModel(backbone, PromptOptions(kind="visual", channels=4, strength=0.5), head, 5, PROTOTYPES)
    black = ServedModel(LocalService(scorer, Ledger()), OPTIONS)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 1), dtype=np.uint8))
    mask = torch.tensor([[True] * 5] * 4 + [[True, True, True, False, False]])
    batch = make_batch([3, 2], images=images, mask=mask)
    noise = torch.Generator().manual_seed(0)
    own = {n: v + 0.1 * torch.randn(v.shape, generator=noise) for n, v in black.init(np.random.default_rng(0)).items()}
    params = stack([own, own])
    (expected, _), (found, output) = white.losses(params, batch), black.losses(params, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert output.logits[4, 3:].tolist() == [float("-inf")] * 2


def test_no_gradient_comes_out_of_a_served_model(scorer, make_batch):
    black = ServedModel(LocalService(scorer, Ledger()), OPTIONS)
    params = {n: v.requires_grad_() for n, v in stack([black.init(np.random.default_rng(0))]).items()}
    losses, _ = black.losses(params, make_batch([2], images=torch.zeros(2, 28, 28, 1, dtype=torch.uint8)))
    assert not losses.requires_grad


def test_images_that_are_no_numbers_are_neither_counted_nor_scored(scorer):
    service, images = LocalService(scorer, Ledger()), pixels(3)
    images[1, 0, 5, 5] = np.nan
    scores = service.scores(0, images, (1, 0))
    assert scores.shape == (3, 5)
    assert np.isnan(scores).all()
    assert service.counts() == {}


# --- training through it


def train(service, make_examples, optimizer="spsa-gc", samples=20, **kept):
    model = ServedModel(service, OPTIONS)
    rule = make_rule(LocalOptions(optimizer=optimizer, prompt_lr=0.001))
    task = Task(4, model.init(np.random.default_rng(0)), epochs=2, **kept)
    training = Training(rule, batch_size=8, trains=lambda name: True, seed=0, round=1)
    return train_group(model.asking(4, (1,)), [task], [make_examples(samples)], training), task


@pytest.mark.parametrize(("optimizer", "per_image"), [("spsa-gc", 2), ("spsa", 2), ("rgf", 2)])
def test_a_step_costs_two_queries_per_image(scorer, make_examples, optimizer, per_image):
    service = LocalService(scorer, Ledger())
    (update,), _ = train(service, make_examples, optimizer)
    assert service.counts() == {4: 2 * 20 * per_image}
    assert update.steps == 6


def test_a_client_whose_budget_ends_sends_what_it_has(scorer, make_examples):
    whole, _ = train(LocalService(scorer, Ledger()), make_examples)
    service = LocalService(scorer, Ledger(budget=50))  # three steps of 8, 8 and 4 images, two queries each, and a rest
    (update,), task = train(service, make_examples)
    assert update.steps == 3
    assert update.kept["count"] == 3
    assert service.counts() == {4: 48}
    assert not torch.equal(update.params["visual.3.bias"], task.params["visual.3.bias"])
    assert not torch.equal(update.params["visual.3.bias"], whole[0].params["visual.3.bias"])


def test_a_client_without_any_budget_sends_nothing(scorer, make_examples):
    updates, _ = train(LocalService(scorer, Ledger(budget=3)), make_examples)
    assert updates == []


def test_a_call_that_is_repeated_comes_to_the_same_and_counts_once(scorer, make_examples):
    service = LocalService(scorer, Ledger())
    (first,), _ = train(service, make_examples)
    before = service.counts()
    (second,), _ = train(service, make_examples)
    assert service.counts() == before
    assert all(torch.equal(first.params[n], second.params[n]) for n in first.params)


# --- batching


class Slow:
    """A scorer that remembers the sizes of its batches and waits for a sign before it answers the first."""

    def __init__(self, scorer):
        self._scorer, self.sizes, self.go = scorer, [], threading.Event()

    def __call__(self, images):
        self.sizes.append(len(images))
        assert self.go.wait(30)
        return self._scorer(images)


def test_requests_that_wait_are_answered_together_and_each_gets_its_own(scorer):
    slow, requests = Slow(scorer), [pixels(n, seed) for seed, n in enumerate((4, 3, 5, 1))]

    async def ask():
        batcher = Batcher(slow)
        asking = [asyncio.create_task(batcher.scores(images)) for images in requests[:1]]
        while not slow.sizes:
            await asyncio.sleep(0.01)
        asking += [asyncio.create_task(batcher.scores(images)) for images in requests[1:]]
        await asyncio.sleep(0)
        slow.go.set()
        return await asyncio.gather(*asking)

    answers = asyncio.run(ask())
    assert slow.sizes == [4, 9]
    for images, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer, scorer(images), atol=1e-5)


def test_batches_have_a_largest_size_unless_one_request_is_larger():
    sizes = []

    def score(images):
        sizes.append(len(images))
        return images[:, :1, 0, 0]

    async def ask():
        batcher = Batcher(score)
        return await asyncio.gather(*(batcher.scores(np.zeros((n, 3, 2, 2))) for n in (AT_ONCE - 1, 1, 1, 2 * AT_ONCE)))

    assert [len(answer) for answer in asyncio.run(ask())] == [AT_ONCE - 1, 1, 1, 2 * AT_ONCE]
    assert sizes == [AT_ONCE, 1, 2 * AT_ONCE]


def test_a_batch_that_fails_fails_its_askers_and_nobody_else():
    def score(images):
        if images.min() < 0:
            raise FloatingPointError("no")
        return images[:, :1, 0, 0]

    async def ask():
        batcher = Batcher(score)
        with pytest.raises(FloatingPointError):
            await batcher.scores(np.full((2, 3, 2, 2), -1.0))
        return await batcher.scores(np.ones((2, 3, 2, 2)))

    assert asyncio.run(ask()).tolist() == [[1], [1]]


def test_a_repeated_request_gets_the_same_bits_and_large_ones_go_in_pieces():
    asked = []

    def score(images):
        asked.append(len(images))
        return images[:, 0, 0, :1] + np.float32(len(asked))  # another answer every time

    async def ask():
        desk, ledger = Desk(Batcher(score)), Ledger()
        images = np.random.default_rng(0).random((AT_ONCE + 1, 3, 2, 2), dtype=np.float32)
        return [await desk.scores(ledger, 3, images, (1, 0)) for _ in range(2)], ledger.counts()

    (first, again), counts = asyncio.run(ask())
    assert (first == again).all()
    assert asked == [AT_ONCE, 1]
    assert counts == {3: AT_ONCE + 1}


def test_answers_are_kept_within_their_room_the_newest_first():
    answers, scores = Answers(largest=24), np.zeros((1, 3), np.float32)  # room for two
    for content in (b"a", b"b", b"b", b"a", b"c"):
        answers.put(content, scores) if answers.get(content) is None else None
    assert [answers.get(content) is not None for content in (b"a", b"b", b"c")] == [True, False, True]
