"""The documentation: its links lead somewhere, and its picture shows the figures of the page that it is made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import armopt
from benchmarks import gain

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in headings(target), link


def test_messages_lead_to_sections_that_exist() -> None:
    for source in [*(ROOT / "armopt").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for name, anchor in re.findall(r"(docs/\w+\.md)#([\w-]+)", source.read_text()):
            assert anchor in headings(ROOT / name), f"{source}: {name}#{anchor}"


def test_every_page_is_in_the_site_and_every_public_name_in_the_reference() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if page.parent.name == "docs" and f": {page.name}\n" not in navigation] == []
    listed = re.findall(r"^::: armopt\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(set(armopt.__all__) - {"__version__"})


def test_the_readmes_picture_is_the_pages_figures() -> None:
    """Regenerate it with: python -m benchmarks.gain --write."""
    assert gain.PICTURE.read_text() == gain.svg(gain.gains(gain.PAGE.read_text()))
    assert "gain.svg" in (ROOT / "README.md").read_text().split("## ")[0]


def test_a_page_that_lacks_a_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no 'resnet50 224'"):
        gain.gains("| model | eager fast math | armopt |\n| vit | 1 | 1 |\n")


def test_the_glossary_has_the_words_that_are_asked_for() -> None:
    text = (ROOT / "docs/glossary.md").read_text()
    terms = re.findall(r"^\*\*(.+?)\.\*\*", text, re.MULTILINE)
    assert {"Site", "Bucket", "Program", "Twin", "Probe", "Block"} <= set(terms)
    assert terms == sorted(terms, key=str.lower)
