"""Standard output and error that are closed, full, left by their reader, or of another encoding."""

import os
import subprocess
import sys

import pytest

START = "from fedprompt import outlets\noutlets.prepare()\n"
LIST = "import click\n[click.echo('α ± × \\udc80 ' + 'x' * 60) for _ in range(5000)]\n"
END = "import os, fedprompt.__main__ as m; code = m._code(outlets.finish); os._exit(code)\n"
RUN = "outlets.keep_going()\n"
DONE = "open('done', 'w').close()\n"


def shell(program, redirected, folder, **environment):
    """Run a program, its output redirected as a shell does; returns exit code and what is left on standard error."""
    (folder / "program.py").write_text(program)
    command = f"set -o pipefail; {sys.executable} program.py {redirected}"
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, **environment},
    )
    return ended.returncode, ended.stderr, (folder / "done").exists()


LOST = [
    ("| head -1", 141, ""),
    ("> /dev/full", 1, "fedprompt: standard output: No space left on device\n"),
    (">&-", 0, ""),
    ("2>&-", 0, ""),
    ("<&- >&- 2>&-", 0, ""),
    ("2> /dev/full", 0, ""),
]


@pytest.mark.parametrize(("redirected", "code", "errors"), LOST)
def test_a_list_ends_quietly_when_its_output_is_lost(tmp_path, redirected, code, errors):
    found = shell(START + LIST + DONE + END, redirected, tmp_path)
    assert found == (code, errors, code == 0)


@pytest.mark.parametrize(("redirected", "code", "errors"), LOST)
def test_a_run_goes_on_when_its_output_is_lost(tmp_path, redirected, code, errors):
    assert shell(START + RUN + LIST + DONE + END, redirected, tmp_path) == (0, errors, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8:strict"])
def test_no_encoding_is_too_poor_for_our_texts(tmp_path, encoding):
    also = "print('α ± × \\udc80'); print('α \\udc80', file=__import__('sys').stderr)\n"
    code, errors, done = shell(START + LIST + also + DONE + END, "> /dev/null", tmp_path, PYTHONIOENCODING=encoding)
    assert (code, done) == (0, True)
    assert "Traceback" not in errors


def test_a_file_that_is_opened_later_does_not_get_what_is_printed(tmp_path):
    program = START + "file = open('file', 'w')\nos = __import__('os')\nos.write(1, b'printed')\n" + END
    assert shell(program, "<&- >&- 2>&-", tmp_path)[0] == 0
    assert (tmp_path / "file").read_text() == ""


def test_the_program_itself_ends_quietly_when_its_reader_has_left(tmp_path):
    program = "import sys\nsys.argv = ['fedprompt', 'algorithms']\nimport fedprompt.__main__ as m\nm.main()\n"
    assert shell(program, "| true", tmp_path)[:2] == (141, "")
