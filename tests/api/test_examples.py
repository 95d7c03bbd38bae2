"""The notebook in examples/ is executed."""

import json
from pathlib import Path

import matplotlib as mpl

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_steps.ipynb"
MOST_LINES = 40


def test_the_notebook_runs_and_is_short(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = [line for cell in cells for line in cell["source"] if line.strip()]
    assert len(lines) <= MOST_LINES
    names: dict[str, object] = {}
    with mpl.rc_context({"backend": "agg"}):
        for cell in cells:
            exec("".join(cell["source"]), names)
    assert {run.result["rounds"] for run in names["runs"].values()} == {5}
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    assert (tmp_path / "exported" / "trained.safetensors").exists()
    assert len(names["labels"]) == 1
    assert all(not cell["outputs"] for cell in cells)  # outputs are not kept, so that none is stale
