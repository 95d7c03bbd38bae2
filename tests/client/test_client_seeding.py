"""Random numbers are named by seed, stream, round and client, and by nothing else."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fedprompt.seeding import Stream, generator

NAMES = [
    (0, Stream.BATCHES, 0, 0),
    (1, Stream.BATCHES, 0, 0),
    (0, Stream.DROPOUT, 0, 0),
    (0, Stream.BATCHES, 1, 0),
    (0, Stream.BATCHES, 0, 1),
    (1, Stream.DATA, 0, 7),
    (7, Stream.DATA, 0, 1),
    (0, Stream.VALIDATION, 7, 0),
]


def draw(name) -> np.ndarray:
    return generator(*name).random(50)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_name_draws_the_same_numbers(name):
    first = draw(name)
    np.random.default_rng(0).random(10)  # nothing in between matters
    assert (draw(name) == first).all()


def test_different_names_draw_unrelated_numbers():
    drawn = {name: draw(name) for name in NAMES}
    for one, other in combinations(NAMES, 2):
        assert not (drawn[one] == drawn[other]).any()


def test_round_and_client_are_zero_if_not_named():
    assert (generator(3, Stream.INIT).random(5) == generator(3, Stream.INIT, 0, 0).random(5)).all()


def test_a_negative_part_of_the_name_is_refused():
    with pytest.raises(ValueError, match="negative"):
        generator(-1, Stream.INIT)


def test_streams_keep_their_numbers():
    """They are part of every result, so they may be appended to but never renumbered."""
    published = ("DATA", "VALIDATION", "PARTITION", "LOCAL_TEST", "TEST_ORDER", "INIT", "COHORT", "BATCHES", "DROPOUT")
    published += ("AGGREGATE", "SUBSAMPLE")
    assert [Stream[name].value for name in published] == list(range(11))
    assert len({stream.value for stream in Stream}) == len(Stream)
