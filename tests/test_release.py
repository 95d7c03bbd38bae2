"""What belongs to a release agrees: its version everywhere, and the pages for contributors with what they speak of."""

import ast
import datetime
import re
import subprocess
import sys
from pathlib import Path

import import_rules
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def version():
    """The version as the package's source has it, as a plain text that can be read without an import."""
    for node in ast.parse(text("fedprompt/__init__.py")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise AssertionError("no plain __version__")


def releases():
    """Versions and dates of the changelog, newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)


def targets():
    return set(re.findall(r"^([a-z][\w-]*):", text("Makefile"), re.MULTILINE))


def test_package_changelog_and_citation_have_one_version_and_date():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert (citation["version"], citation["date-released"]) == releases()[0]
    assert version() == releases()[0][0]
    assert f'"{citation["license"]}"' in text("pyproject.toml")


def test_a_build_reads_the_version_without_importing_the_package():
    pytest.importorskip("setuptools", minversion="77.0.3")  # what the build demands; tests need less
    code = (
        "import sys; from setuptools.config.pyprojecttoml import read_configuration as read\n"
        "print(read('pyproject.toml')['project']['version'], 'torch' in sys.modules or 'fedprompt' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [version(), "False"], done.stderr


def test_releases_are_in_order_and_have_dates():
    found = [(tuple(map(int, number.split("."))), datetime.date.fromisoformat(date)) for number, date in releases()]
    assert len(found) >= 2
    assert found == sorted(found, reverse=True)
    assert text("CHANGELOG.md").count("\n## [") == len(found) + text("CHANGELOG.md").count("\n## [Unreleased]")


def test_the_citation_has_what_its_format_demands():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])


def test_the_workflow_runs_ci_on_the_lowest_python_and_a_newer_one():
    (job,) = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"].values()
    lowest = re.search(r'requires-python = ">=([\d.]+)"', text("pyproject.toml")).group(1)
    assert lowest in job["strategy"]["matrix"]["python-version"]
    assert "3.12" in job["strategy"]["matrix"]["python-version"]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_hooks_are_tools_of_the_projects_own_environment():
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"].split()[0] for hook in repository["hooks"]] == [
        ".venv/bin/ruff",
        ".venv/bin/ruff",
        ".venv/bin/mypy",
    ]
    tools = re.search(r"^test = \[(.*)\]$", text("pyproject.toml"), re.MULTILINE).group(1)
    assert '"mypy>=' in tools
    assert '"ruff>=' in tools


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_command_of_a_page_is_a_target(page):
    code = re.findall(r"`([^`\n]+)`", page.read_text("utf-8")) + re.findall(
        r"```\w*\n(.*?)```", page.read_text("utf-8"), re.DOTALL
    )
    named = {name for piece in code for name in re.findall(r"^(?:\$ )?make ([a-z][\w-]*)", piece, re.MULTILINE)}
    assert named <= targets()


def test_contributors_are_told_of_every_target_that_checks_something():
    page = text("CONTRIBUTING.md")
    assert all(f"`make {name}`" in page for name in ("check", "lint", "test", "test-all", "test-lowest", "demo"))
    assert {"check", "lint", "test", "test-all", "test-lowest", "demo", "setup"} <= targets()


def test_paths_that_contributors_are_told_of_exist():
    named = set(re.findall(r"`((?:fedprompt|tests|docs|studies|benchmarks)/[\w/.]*)`", text("CONTRIBUTING.md")))
    assert len(named) > 10
    assert {name for name in named if "NAME" not in name and not (ROOT / name).exists()} == set()


def test_make_check_runs_files_that_exist():
    unit = re.search(r"^UNIT := ((?:.*\\\n)*.*)$", text("Makefile"), re.MULTILINE).group(1)
    paths = unit.replace("\\\n", " ").split()
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_table_of_rooms_is_the_order_that_tests_enforce():
    section = text("docs/architecture.md").partition("## Rooms")[2]
    rows = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    levels = [tuple("" if room == "fedprompt" else room for room in re.findall(r"`([\w.]+)`", row)) for row in rows]
    assert levels == list(import_rules.LEVELS)


def test_the_share_of_lines_that_the_page_names_is_the_one_that_tests_enforce():
    assert f"more than {import_rules.LARGEST_SHARE * 100:.0f} %" in text("docs/architecture.md")
    assert all(f"`{room}`" in text("docs/architecture.md") for room in import_rules.RAY_ROOMS)


def test_new_modules_that_the_changelog_names_exist():
    table = text("CHANGELOG.md").partition("Modules, for packages")[2].partition("## [0.1.0]")[0]
    for row in re.findall(r"^\| `.*$", table, re.MULTILINE):
        new = row.split("|")[2]
        for name in re.findall(r"`(fedprompt(?:\.\w+)+)`", new):
            path = ROOT / name.replace(".", "/")
            owner = path.parent.with_suffix(".py")  # of a class
            assert path.is_dir() or path.with_suffix(".py").exists() or owner.exists(), name
