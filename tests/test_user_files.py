"""Files that users name: what is no regular file is refused unopened, in one line; and texts of theirs on one line."""

import pytest
from special_files import SPECIAL, make_special

from fedprompt.errors import InputError
from fedprompt.files import open_regular, read_regular
from fedprompt.texts import printable


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused_with_its_key_and_path(tmp_path, kind):
    make_special(kind, tmp_path / "x")
    with pytest.raises(InputError, match=r"head\.embeddings: .*/x: (is|cannot be read)"):
        open_regular(tmp_path / "x", "head.embeddings")


@pytest.mark.parametrize("path", ["nowhere", "a\0b", "x" * 300])
def test_a_path_of_no_file_is_one_line(path):
    with pytest.raises(InputError, match="allowed: a readable file") as refused:
        open_regular(path)
    assert "\0" not in str(refused.value)


def test_a_file_larger_than_its_reader_can_use_is_not_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, most=5) == b"12345"
    with pytest.raises(InputError, match="5 bytes; allowed: at most 4"):
        read_regular(path, most=4)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eright to left", r"\u202eright to left"),
        ("\udcff", r"\udcff"),
        ("", "''"),
        ("x" * 100, "x" * 39 + "…"),
        ("größe 犬", "größe 犬"),
    ],
)
def test_a_text_of_the_users_is_one_printable_line(text, shown):
    assert printable(text) == shown
