"""README and the pages in docs/ point at what is there: files, pictures, and headings of pages."""

import re

import pytest
from pages import PAGES, ROOT

CHANGELOG = ROOT / "CHANGELOG.md"  # whose headings repeat from version to version
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """A page without its blocks of code and its code in lines, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[][()]", "", code.group()), text)


def anchors(page):
    """The names by which GitHub knows the headings of a page."""
    names = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        names.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return names


def links(page):
    return [link for link in LINK.findall(prose(page)) if not link.startswith(("http://", "https://"))]


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_of_a_page_is_there(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_headings_of_a_page_differ_so_that_each_has_an_anchor(page):
    assert len(set(anchors(page))) == len(anchors(page))


def test_every_page_and_picture_is_reached_from_readme():
    reached, to_read = set(), [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page not in reached and page.exists():
            reached.add(page)
            if page.suffix == ".md":
                to_read += [(page.parent / link.partition("#")[0]).resolve() for link in links(page) if link[0] != "#"]
    shown = {*PAGES, CHANGELOG, *(path for room in ("docs", "studies") for path in (ROOT / room).rglob("*.png"))}
    assert {path.relative_to(ROOT) for path in shown - reached} == set()


def test_what_is_no_link_is_not_taken_for_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` and [c](d.md)!\n\n`[x](y)` [e\nf](g.md#h)\n\n```\n# [z](q)\n```\n![i](j.png)\n")
    assert links(page) == ["d.md", "g.md#h", "j.png"]
    assert anchors(page) == ["a-b-and-c"]
