"""Every section that a docstring or a comment cites is a heading of docs/algorithm.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("automagic_core", "automagic_torch", "automagic_optax", "parity", "benchmarks", "examples", "tests")
CITATION = re.compile(r"\b[Ss]ections?\s+((?:\d+(?:\.\d+)*(?:,\s+|\s+and\s+|\s+to\s+)?)+)")


def cited(text: str) -> set[str]:
    """The numbers of all sections that a text cites, those of a range by its ends."""
    return {number for found in CITATION.findall(text) for number in re.findall(r"\d+(?:\.\d+)*", found)}


@pytest.fixture(scope="module")
def headings() -> dict[str, str]:
    page = (ROOT / "docs" / "algorithm.md").read_text()
    return dict(re.findall(r"^#+ (\d+(?:\.\d+)*)\.? (.+)$", page, re.MULTILINE))


@pytest.mark.parametrize("folder", FOLDERS)
def test_cited_sections_exist(folder: str, headings: dict[str, str]) -> None:
    wrong = {
        str(path.relative_to(ROOT)): missing
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (missing := cited(path.read_text()) - headings.keys())
    }
    assert not wrong


def test_the_page_cites_only_its_own_sections(headings: dict[str, str]) -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text()
    assert cited(page) <= headings.keys()


def test_a_missing_section_would_be_seen(headings: dict[str, str]) -> None:
    number = max(int(heading.split(".")[0]) for heading in headings) + 1
    text = f"as sections 3, 5.4 and {number} say; Section 7"
    assert cited(text) == {"3", "5.4", "7", str(number)}
    assert cited(text) - headings.keys() == {str(number)}


def test_the_glossary_is_short() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text()
    rows = [line for line in page[page.index("Glossary") :].splitlines() if line.startswith("| ")]
    assert 0 < len(rows) - 1 <= 25
