"""Numbers in words, and lists in columns."""

import pytest

from fedprompt.listings import columns
from fedprompt.wording import counted, duration


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "round", "1 round"),
        (2, "round", "2 rounds"),
        (0, "trial", "0 trials"),
        (1438, "image", "1,438 images"),
        (2, "class", "2 classes"),
        (1.0, "prompt", "1 prompt"),
    ],
)
def test_a_number_has_its_noun(number, noun, text):
    assert counted(number, noun) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h"), (7500, "2 h 5 min")]
)
def test_a_duration_has_its_unit(seconds, text):
    assert duration(seconds) == text


ROWS = [
    ("a", "present", "what it is, in rather more words than there is room for on one line of a narrow terminal"),
    ("get it: with python -c \"import a; print('b')\"",),
    ("a_name_of_fifty_characters_that_is_longer_than_most_", "absent", "another"),
]


def test_columns_are_as_wide_as_their_longest_text_and_never_run_together():
    lines = list(columns(ROWS, width=80))
    start = lines[0].index("what it is")
    assert start > len(ROWS[2][0])
    assert lines[-1].index("another") == start
    assert all(line.startswith(" " * start) for line in lines[1:-1])
    assert [line for line in lines if "print('b')" in line and "python -c" in line]


def test_lines_end_at_the_width_where_words_allow_it():
    lines = list(columns(ROWS, indent=4, width=100))
    assert max(map(len, lines)) <= 100
    assert " ".join(line.split("  ")[-1].strip() for line in lines).count("narrow terminal") == 1
    assert "".join(columns(ROWS[:1], width=10**6)).endswith("terminal")
