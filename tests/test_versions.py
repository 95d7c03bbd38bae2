"""The versions that pyproject.toml allows, the lists that are made of them, and what is used beside public names."""

import ast
import importlib
import re
import sys

import pytest
from pages import PAGES, ROOT


def minima():
    """Lowest version of every package that pyproject.toml asks for with >=."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name.lower(): version for name, version in re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', text)}


def pins(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def release(version):
    return tuple(map(int, version.split(".")))


def test_the_lowest_versions_are_those_of_pyproject():
    asked, pinned = minima(), pins("constraints-lowest.txt")
    assert set(asked) - {"mypy", "ruff"} <= set(pinned) | {"setuptools", "starlette", "uvicorn", "hypothesis"}
    for name in set(asked) & set(pinned):
        count = len(release(asked[name]))
        assert release(pinned[name])[:count] == release(asked[name]) or name == "setuptools", name


def test_torch_is_a_release_whose_loader_executes_nothing():
    assert release(minima()["torch"]) >= (2, 10)
    assert release(pins("constraints.txt")["torch"]) >= (2, 10)


def test_rays_minor_version_is_capped_and_all_cluster_files_have_an_allowed_one():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ranges = set(re.findall(r'"ray(?:\[[\w,]+\])?>=(\d+\.\d+),<(\d+\.\d+)"', text))
    assert len(ranges) == 1
    (lowest, beyond), *_ = ranges
    assert len(re.findall(r'"ray[\[>]', text)) == len(re.findall(r'"ray(?:\[[\w,]+\])?>=[\d.]+,<', text))
    files = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "cluster").glob("*.yaml"))
    named = re.findall(r"rayproject/ray:(\d+\.\d+)|rayVersion: (\d+\.\d+)", files)
    assert named
    assert all(release(lowest) <= release(one or other) < release(beyond) for one, other in named)


def private_names(path):
    """Dotted names of other packages, as far as their first part with an underscore, that a file imports or uses."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:  # `import a.b` binds a, `import a.b as c` binds a.b
                top = alias.name.partition(".")[0]
                modules[alias.asname or top] = alias.name if alias.asname else top
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            modules |= dict(names)
            found |= {name for _, name in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] in modules and all(part.isidentifier() for part in parts):
                found.add(".".join([modules[parts[0]], *parts[1:]]))
    own = sys.stdlib_module_names | {"fedprompt"}
    return {cut for name in found if name.partition(".")[0] not in own and (cut := first_private(name))}


def first_private(name):
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__"):
            below = part == "_private" and i + 1 < len(parts)
            return ".".join(parts[: i + 1 + below])
    return None


def listed():
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([\w.]+)` \| \w+ \d", page, re.MULTILINE))


def test_every_private_name_of_another_package_is_listed_and_no_other():
    used = set().union(*(private_names(path) for path in (ROOT / "fedprompt").rglob("*.py")))
    assert used == listed()


@pytest.mark.parametrize("name", sorted(listed()))
def test_the_installed_release_has_it(name):
    module, _, last = name.rpartition(".")
    pytest.importorskip(name.partition(".")[0])
    assert hasattr(importlib.import_module(module), last) or importlib.import_module(name)


def test_private_names_are_found_however_they_are_imported(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "import torch, ray as r\nfrom timm.layers import _a\nimport os\nfrom ray._private import services\n"
        "torch._C.x\ntorch.nn.functional._b(1)\nos._exit\ntorch.__version__\nr._raylet\nself._own\n"
    )
    found = private_names(file)
    assert found == {"timm.layers._a", "ray._private.services", "torch._C", "torch.nn.functional._b", "ray._raylet"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_get_timm_in_the_way_that_works_with_every_torchvision(page):
    for code in re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        assert not re.search(r"^\s*(import|from) timm\b", code, re.MULTILINE)
