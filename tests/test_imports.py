"""Imports of the package point one way, and the rules that say so find what breaks them."""

from pathlib import Path

import import_rules as rules
import pytest

PACKAGE = Path(__file__).parents[1] / "fedprompt"


@pytest.fixture(scope="module")
def found():
    return rules.imports(PACKAGE)


@pytest.fixture
def house(tmp_path):
    """Make a package of the given files and return what it imports."""

    def build(files):
        for name, text in files.items():
            path = tmp_path / "fedprompt" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return rules.imports(tmp_path / "fedprompt")

    return build


def test_every_module_imports_its_own_level_or_lower_ones(found):
    assert len(found) > 500
    assert rules.against_direction(found) == []


def test_there_are_no_circles_of_modules_or_rooms(found):
    assert rules.module_circle(found) == []
    assert rules.room_circle(found) == []


def test_ray_is_imported_where_it_may_be_and_nowhere_else(found):
    assert any(one.target == ":ray" for one in found)
    assert rules.ray_elsewhere(found) == []


def test_no_folder_holds_more_than_its_share_of_the_lines():
    assert sum(rules.shares(PACKAGE).values()) == pytest.approx(1)
    assert rules.too_large(PACKAGE) == []


UPWARDS = {
    "at the top": "from fedprompt.runtime.pool import Pool\n",
    "of a module": "from fedprompt.runtime import pool\n",
    "whole": "import fedprompt.runtime.pool\n",
    "in a function": "def f():\n    from fedprompt.runtime import pool\n",
    "for types only": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedprompt.runtime.pool as p\n",
    "relative": "from ..runtime import pool\n",
    "by its name": "from importlib import import_module\nimport_module('fedprompt.runtime.pool')\n",
}


@pytest.mark.parametrize("code", UPWARDS.values(), ids=UPWARDS)
def test_an_import_of_a_higher_room_is_found_however_it_is_written(house, code):
    (line,) = rules.against_direction(house({"client/train.py": code, "runtime/pool.py": ""}))
    assert line.startswith("client.train:")
    assert line.endswith("imports runtime.pool")


def test_imports_of_lower_rooms_and_of_the_same_room_are_allowed(house):
    found = house(
        {
            "client/train.py": "from fedprompt.client.batches import f\nfrom fedprompt.models import g\nimport torch\n",
            "client/batches.py": "",
            "models/__init__.py": "",
        }
    )
    assert {one.target for one in found} == {"client.batches", "models", ":torch"}
    assert rules.against_direction(found) == []
    assert rules.module_circle(found) == rules.room_circle(found) == []


def test_the_schema_is_lower_than_the_rest_of_its_folder(house):
    found = house(
        {
            "config/__init__.py": "",
            "config/schema.py": "",
            "config/parsing.py": "from fedprompt.config import schema",
            "data/a.py": "import fedprompt.config.schema",
            "data/b.py": "import fedprompt.config.parsing",
        }
    )
    assert rules.against_direction(found) == ["data.b:1 imports config.parsing"]


def test_a_module_without_a_room_is_found(house):
    found = house({"attic.py": "from fedprompt import errors", "errors.py": ""})
    assert rules.against_direction(found) == ["attic: has no room in LEVELS"]


def test_a_circle_of_modules_in_one_room_is_found(house):
    found = house(
        {
            "data/a.py": "import fedprompt.data.b",
            "data/b.py": "def f():\n    import fedprompt.data.c",
            "data/c.py": "from fedprompt.data.a import x",
        }
    )
    assert rules.against_direction(found) == []
    assert set(rules.module_circle(found)) == {"data.a", "data.b", "data.c"}
    assert rules.room_circle(found) == []


def test_a_circle_of_rooms_of_one_level_is_found(house):
    found = house(
        {
            "data/a.py": "import fedprompt.models.a",
            "models/a.py": "",
            "models/b.py": "import fedprompt.data.b",
            "data/b.py": "",
        }
    )
    assert rules.against_direction(found) == rules.module_circle(found) == []
    assert set(rules.room_circle(found)) == {"data", "models"}


def test_ray_in_the_wrong_room_is_found_and_a_folder_of_that_name_is_not_taken_for_it(house):
    found = house(
        {
            "runtime/pool.py": "def f():\n    from ray.util import state\n",
            "runtime/ray/pool.py": "import ray\n",
            "sweeps/sweep.py": "from ray import tune\nfrom fedprompt.runtime.ray import pool\n",
        }
    )
    assert rules.ray_elsewhere(found) == ["runtime.pool:2 imports :ray"]


def test_a_folder_with_too_many_lines_is_found_without_those_of_its_subfolders(house, tmp_path):
    house(
        {
            "algorithms/a.py": "#\n" * 50,
            "data/a.py": "#\n" * 16,
            "models/a.py": "#\n" * 14,
            "models/kinds/a.py": "#\n" * 10,
            "client/a.py": "#\n" * 10,
        }
    )
    assert rules.too_large(tmp_path / "fedprompt") == ["data: 16.0% of all lines"]
