"""Tables on the pages say what the files of results say: no number is stale or mistyped."""

import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
SCALES = (1, 100, 1e-3, 1e-6)  # as it is, in percent, from micro- to milliseconds, from bytes to MB
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w])")


PAGE = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
PAGE += "".join(f"\n#{(ROOT / 'studies' / name / 'README.md').read_text('utf-8')}" for name in ("layers", "recovery"))
RESULTS = sorted([*ROOT.glob("benchmarks/results/*.json"), *ROOT.glob("studies/*/results/*.json")])
MEASURED = [path for path in RESULTS if f"\n## {path.stem.title()}\n" in PAGE]


def rows(name):
    """The rows of the tables in the section of a benchmark, without their heads."""
    lines = PAGE.partition(f"\n## {name.title()}\n")[2].partition("\n## ")[0].splitlines()
    rules = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    heads = {*rules, *(i - 1 for i in rules)}
    return [line for i, line in enumerate(lines) if line.startswith("| ") and i not in heads]


def measured(tree):
    """All numbers in a file, and what the tables make of them: medians of turns, and the seconds of whole rounds."""
    if isinstance(tree, dict):
        found = [number for value in tree.values() for number in measured(value)]
        if {"train", "aggregate", "evaluate"} <= set(tree):
            found.append(tree["train"] + tree["aggregate"] + tree["evaluate"])
        return found
    if isinstance(tree, list):
        found = [number for value in tree for number in measured(value)]
        return [*found, median(tree)] if tree and all(isinstance(value, float) for value in tree) else found
    return [tree] if isinstance(tree, int | float) else []


def is_rounded(shown, numbers):
    """Whether a number as it is shown is one of these, in one of the units, to the digits that are shown."""
    half = 0.5 * 10.0 ** -len(shown.partition(".")[2])
    value = float(shown.replace(",", ""))
    return any(abs(number * scale - value) <= half * 1.001 for number in numbers for scale in SCALES)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_tables_are_made_of_what_was_measured(path):
    numbers, table = measured(json.loads(path.read_text())), rows(path.stem)
    assert table
    for row in table:
        cells = [cell for cell in row.strip("| ").split(" | ") if not re.search(r"[a-z]", cell)]
        for shown in (shown for cell in cells for shown in NUMBER.findall(cell)):
            assert is_rounded(shown, [*numbers, 1]), f"{shown} in: {row}"


STUDIES = ("blackbox", "graphs", "profit")
SPREAD = re.compile(r"[−-]?\d+\.\d+ ± \d+\.\d+")


def spreads(text):
    """All means with their standard deviations in a text."""
    return {found.replace("−", "-") for found in SPREAD.findall(text)}


@pytest.mark.parametrize("study", STUDIES)
def test_means_over_seeds_are_those_that_were_measured(study):
    folder = ROOT / "studies" / study
    shown = spreads((folder / "README.md").read_text(encoding="utf-8"))
    rows = json.loads((folder / "results" / f"{study}.json").read_text())["rows"]
    assert shown
    assert shown <= spreads(json.dumps(rows, ensure_ascii=False))


def test_no_section_has_lost_its_file():
    assert len(MEASURED) >= 10


def test_a_wrong_number_is_found():
    assert is_rounded("1,967", [1966.78])
    assert is_rounded("0.671", [671.08])
    assert is_rounded("98.36", [0.98356])
    assert not is_rounded("1,966", [1966.78])
    assert not is_rounded("0.68", [671.08])
    assert spreads("−5.3 ± 2.3 / 1") == {"-5.3 ± 2.3"}
