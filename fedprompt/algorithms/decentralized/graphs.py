"""Undirected graphs over clients that have no server, and how neighbours weigh in an average.

A graph is its links: int [E, 2], every pair once, the smaller number first, in ascending order. Weights are
Metropolis': with the degree d_i of client i,

    w_ij = 1 / (1 + max(d_i, d_j)) for every link,    w_ii = 1 − Σ_j w_ij

(Xiao, Boyd, Kim: Distributed Average Consensus with Least-Mean-Square Deviation, 2007), so W is symmetric, its rows and
columns sum to 1, and x ← W x keeps the mean whatever the graph. Its spectral gap 1 − |λ|, λ the second largest
eigenvalue in absolute value, tells how much closer to the mean one such step brings everybody, in the worst case.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from scipy.sparse import csr_array

Graph = Literal["ring", "grid", "exponential", "random", "full"]
GRAPHS: tuple[str, ...] = get_args(Graph)


def make_links(graph: Graph, clients: int, degree: int, rng: np.random.Generator) -> np.ndarray:
    """The links [E, 2] of a graph over ``clients``; only ``random`` needs ``degree`` and draws from ``rng``.

    ring: i and i + 1, closed. grid: a lattice in two dimensions with rows of ⌈√N⌉, its borders open, the last row as
    long as clients are left. exponential: i and i + 1, 2, 4, 8, ... around the ring, in both directions. random: the
    union of ``degree`` / 2 rings, each through all clients in an order drawn anew; so it is connected, and a client
    has ``degree`` neighbours, or a few less where two rings share a link. full: everybody with everybody.
    """
    everybody = np.arange(clients)
    if graph == "ring":
        pairs = [_ring(everybody)]
    elif graph == "grid":
        row = math.ceil(math.sqrt(clients))
        right, below = everybody[everybody % row < row - 1], everybody
        pairs = [np.stack([right, right + 1], 1), np.stack([below, below + row], 1)]
    elif graph == "exponential":
        steps = 2 ** np.arange(max(1, (clients - 1).bit_length()))
        pairs = [np.stack([everybody, (everybody + step) % clients], 1) for step in steps if step < clients]
    elif graph == "random":
        pairs = [_ring(rng.permutation(clients)) for _ in range(degree // 2)]
    else:
        pairs = [np.stack(np.triu_indices(clients, 1), 1)]
    links = np.sort(np.concatenate([np.empty((0, 2), dtype=np.int64), *pairs]), axis=1)
    inside = (links[:, 0] != links[:, 1]) & (links[:, 1] < clients)
    return np.unique(links[inside], axis=0)


def _ring(order: np.ndarray) -> np.ndarray:
    return np.stack([order, np.roll(order, -1)], 1)


def lose(links: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """The links that are left where each fails with ``probability``, in both directions; draws one number per link."""
    return links[rng.random(len(links)) >= probability]


def among(links: np.ndarray, clients: np.ndarray) -> np.ndarray:
    """The links between ``clients`` [n] (ascending), renumbered by their places in it."""
    inside = np.isin(links, clients).all(axis=1)
    return np.searchsorted(clients, links[inside])


def metropolis(links: np.ndarray, clients: int) -> csr_array:
    """W [clients, clients], sparse; a row holds its diagonal and its neighbours in ascending order."""
    degrees = np.bincount(links.ravel(), minlength=clients)
    first, second = links.T
    weights = 1 / (1 + np.maximum(degrees[first], degrees[second]))
    own = 1 - np.bincount(first, weights, clients) - np.bincount(second, weights, clients)
    everybody = np.arange(clients)
    rows, columns = np.concatenate([first, second, everybody]), np.concatenate([second, first, everybody])
    matrix = csr_array((np.concatenate([weights, weights, own]), (rows, columns)), shape=(clients, clients))
    matrix.sort_indices()
    return matrix


def spectral_gap(weights: csr_array) -> float:
    """1 − |λ|, λ the eigenvalue of W second to 1 in absolute value; 0 where the graph falls apart, 1 for one client."""
    if weights.shape[0] == 1:
        return 1.0
    sizes = np.sort(np.abs(np.linalg.eigvalsh(weights.toarray())))
    return float(max(0.0, 1 - sizes[-2]))
