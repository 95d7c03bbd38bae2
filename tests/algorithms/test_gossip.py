"""Gossip keeps the mean, brings clients together, and compressed messages are what they are said to be."""

import numpy as np
import pytest

from fedprompt.algorithms.decentralized.gossip import Compression, mix, mix_compressed
from fedprompt.algorithms.decentralized.graphs import GRAPHS, make_links, metropolis, spectral_gap

CLIENTS = 12
COMPRESSIONS = {
    "8 bits": Compression("quantise", bits=8),
    "4 bits": Compression("quantise", bits=4),
    "2 bits": Compression("quantise", bits=2),
    "a tenth": Compression("topk", share=0.1),
}


def weights_of(graph):
    return metropolis(make_links(graph, CLIENTS, 4, np.random.default_rng(0)), CLIENTS)


def models(seed=0, size=300):
    rng = np.random.default_rng(seed)
    return {"prompt": rng.normal(size=(CLIENTS, 5, 4)), "head.1.bias": rng.normal(3, 1, size=(CLIENTS, size))}


def distance(values):
    return max(np.abs(x - x.mean(0)).max() for x in values.values())


@pytest.mark.parametrize("graph", GRAPHS)
def test_mixing_is_the_product_with_w_and_comes_closer_by_the_gap(graph):
    before, weights = models(), weights_of(graph)
    after = mix(weights, before)
    for name, x in before.items():
        np.testing.assert_allclose(after[name], np.einsum("ij,j...->i...", weights.toarray(), x), atol=1e-12)
        np.testing.assert_allclose(after[name].mean(0), x.mean(0), atol=1e-12)
        apart, then = (np.linalg.norm(y - y.mean(0)) for y in (x, after[name]))
        assert then <= (1 - spectral_gap(weights)) * apart + 1e-9


def test_on_a_full_graph_one_step_is_the_mean():
    after = mix(weights_of("full"), models())
    for name, x in models().items():
        np.testing.assert_allclose(after[name], np.broadcast_to(x.mean(0), x.shape), atol=1e-12)


@pytest.mark.parametrize("compression", COMPRESSIONS.values(), ids=COMPRESSIONS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_compressed_gossip_keeps_the_mean_and_comes_to_consensus(graph, compression):
    start, weights = models(), weights_of(graph)
    now, public = start, {name: np.zeros_like(x) for name, x in start.items()}
    for _ in range(400):
        now, public = mix_compressed(weights, now, public, compression, compression.gamma)
        for name, x in start.items():
            np.testing.assert_allclose(now[name].mean(0), x.mean(0), atol=1e-9)
    assert distance(now) < 0.02 * distance(start)
    assert max(np.abs(now[name] - public[name]).max() for name in now) < 0.05 * distance(start)


def test_compression_that_leaves_nothing_out_is_plain_gossip():
    start, weights, all_of_it = models(), weights_of("grid"), Compression("topk", share=1.0)
    assert all_of_it.gamma == 1
    after, public = mix_compressed(weights, start, {n: np.zeros_like(x) for n, x in start.items()}, all_of_it, 1.0)
    for name, x in mix(weights, start).items():
        np.testing.assert_allclose(after[name], x, atol=1e-6)  # messages are float32
        np.testing.assert_allclose(public[name], start[name], atol=1e-6)


def test_who_has_no_neighbour_sends_nothing_and_stays():
    start, weights = models(), metropolis(np.array([[0, 1], [1, 2]]), CLIENTS)
    zeros = {name: np.zeros_like(x) for name, x in start.items()}
    after, public = mix_compressed(weights, start, zeros, COMPRESSIONS["8 bits"], 1.0)
    for name, x in start.items():
        np.testing.assert_array_equal(after[name][3:], x[3:])
        assert not public[name][3:].any()
        assert public[name][:3].any()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantised_numbers_are_the_nearest_of_few(bits):
    values = np.random.default_rng(0).normal(size=(3, 1000)) * np.array([[1], [100], [0]])
    sent = Compression("quantise", bits=bits)(values)
    for row, arrived in zip(values, sent, strict=True):
        largest, steps = np.abs(row).max(), 2 ** (bits - 1) - 1
        assert len(np.unique(arrived)) <= 2 * steps + 1
        assert np.abs(arrived - row).max() <= largest / steps / 2 * (1 + 1e-5)
        assert np.abs(arrived).max() == pytest.approx(largest, rel=1e-6)


def test_of_the_largest_share_all_arrives_and_of_the_rest_nothing():
    values = np.random.default_rng(0).normal(size=(4, 50))
    sent = Compression("topk", share=0.2)(values)
    for row, arrived in zip(values, sent, strict=True):
        largest = np.argsort(-np.abs(row))[:10]
        np.testing.assert_allclose(arrived[largest], row[largest], rtol=1e-6)
        assert np.count_nonzero(arrived) == 10


@pytest.mark.parametrize(
    ("compression", "numbers", "length"),
    [
        (Compression("quantise", bits=8), 1000, 1004),
        (Compression("quantise", bits=4), 1001, 505),  # 500.5 bytes of numbers and 4 of their maximum
        (Compression("topk", share=0.1), 1000, 800),
        (Compression("topk", share=0.1), 3, 8),
    ],
)
def test_lengths_of_messages(compression, numbers, length):
    assert compression.bytes(numbers) == length
