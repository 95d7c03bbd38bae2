"""The blocks of docs/python.md run in their order, on a tiny backbone."""

import re
import shlex
from pathlib import Path

import numpy as np
from api_settings import settings
from commands import cli
from PIL import Image

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text("utf-8")


def test_the_page_about_python_is_true(tmp_path, monkeypatch, images):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.asarray(images[0, ..., 0])).save("photo.png")
    tiny = "".join(f'"{key}": {value!r}, ' for key, value in settings().items() if key != "federation.rounds")
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block.count('{"data.name"') == 1
        exec(block.replace('{"data.name"', f'{{{tiny}"data.name"'), names)
    assert len(names["labels"]) == 1
    assert len(names["run"].metrics) == 4
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in commands.strip().splitlines():
        assert cli(*shlex.split(line)[1:]) == 0
    assert (tmp_path / "exported" / "README.md").exists()
