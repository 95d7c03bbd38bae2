"""All pages that the project shows: README and those of its folders."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "studies", "benchmarks")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
