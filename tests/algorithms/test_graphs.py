"""Graphs: who is whose neighbour; and Metropolis weights: symmetric, doubly stochastic, with known spectral gaps."""

import itertools

import numpy as np
import pytest

from fedprompt.algorithms.decentralized.graphs import GRAPHS, among, lose, make_links, metropolis, spectral_gap


def links_of(graph, clients, degree=4, seed=0):
    return make_links(graph, clients, degree, np.random.default_rng(seed))


def neighbours(links, client):
    return sorted(int(a if b == client else b) for a, b in links if client in (a, b))


def is_connected(links, clients):
    reached = {0}
    for _ in range(clients):
        reached |= {int(other) for link in links for other in link if reached & {int(end) for end in link}}
    return len(reached) == clients


def assert_doubly_stochastic(weights):
    dense = weights.toarray()
    np.testing.assert_array_equal(dense, dense.T)
    np.testing.assert_allclose(dense.sum(axis=0), 1, rtol=0, atol=1e-14)
    assert dense.min() >= 0
    assert dense.diagonal().min() > 0


SIZES = (1, 2, 3, 7, 12, 20)


@pytest.mark.parametrize(("graph", "clients"), list(itertools.product(GRAPHS, SIZES)))
def test_every_graph_is_connected_and_simple_and_its_weights_are_doubly_stochastic(graph, clients):
    links = links_of(graph, clients)
    assert is_connected(links, clients)
    assert (links[:, 0] < links[:, 1]).all()
    assert len(np.unique(links, axis=0)) == len(links)
    assert_doubly_stochastic(metropolis(links, clients))


@pytest.mark.parametrize("graph", GRAPHS)
def test_so_they_are_when_links_are_lost_and_clients_away(graph):
    here = np.array([0, 1, 2, 4, 7, 8, 11])
    for seed in range(5):
        links = among(lose(links_of(graph, 12), 0.4, np.random.default_rng(seed)), here)
        assert_doubly_stochastic(metropolis(links, len(here)))


def test_who_is_whose_neighbour():
    assert neighbours(links_of("ring", 6), 0) == [1, 5]
    assert neighbours(links_of("grid", 9), 4) == [1, 3, 5, 7]
    assert neighbours(links_of("grid", 9), 0) == [1, 3]
    assert neighbours(links_of("grid", 8), 7) == [4, 6]  # the last row has two
    assert neighbours(links_of("exponential", 10), 0) == [1, 2, 4, 6, 8, 9]
    assert neighbours(links_of("full", 4), 2) == [0, 1, 3]


def test_random_graphs_are_nearly_regular_and_new_with_every_draw():
    first, second = (links_of("random", 30, degree=6, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, links_of("random", 30, degree=6, seed=0))
    degrees = np.bincount(first.ravel())
    assert degrees.max() == 6
    assert degrees.mean() > 5
    assert degrees.min() >= 2


def test_weights_are_metropolis():
    path = np.array([[0, 1], [1, 2]])
    expected = [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(metropolis(path, 3).toarray(), expected, atol=1e-15)


@pytest.mark.parametrize("clients", [4, 5, 20])
def test_the_gap_of_a_ring_is_the_closed_form(clients):
    eigenvalues = 1 / 3 + 2 / 3 * np.cos(2 * np.pi * np.arange(1, clients) / clients)
    assert spectral_gap(metropolis(links_of("ring", clients), clients)) == pytest.approx(1 - np.abs(eigenvalues).max())


def test_the_gap_is_1_where_one_step_is_consensus_and_0_where_the_graph_falls_apart():
    assert spectral_gap(metropolis(links_of("full", 7), 7)) == pytest.approx(1)
    assert spectral_gap(metropolis(np.array([[0, 1], [2, 3]]), 4)) == pytest.approx(0)
    assert spectral_gap(metropolis(np.empty((0, 2), dtype=int), 3)) == 0
    assert spectral_gap(metropolis(np.empty((0, 2), dtype=int), 1)) == 1


def test_links_fail_with_the_given_probability():
    links = links_of("full", 60)
    left = [len(lose(links, 0.3, np.random.default_rng(seed))) / len(links) for seed in range(20)]
    assert np.mean(left) == pytest.approx(0.7, abs=0.01)
    assert len(set(left)) > 10
    assert np.array_equal(lose(links, 0.0, np.random.default_rng(0)), links)


def test_links_among_some_are_renumbered_by_their_places():
    links = np.array([[0, 2], [2, 5], [3, 5], [1, 2]])
    assert among(links, np.array([0, 2, 5])).tolist() == [[0, 1], [1, 2]]
