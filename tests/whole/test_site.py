"""The pages: errors as the code has them, every public name in the API, links that lead somewhere, code that runs."""

from __future__ import annotations

import importlib
import math
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from automagic_core import FIELD_NAMES
from documentation import errors

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# What to add to other projects' files are fragments; tests/whole/test_recipes.py runs them.
OF_WHOLE_STATEMENTS = [page for page in PAGES if page.parent.name != "maintainers" and page.stem != "recipes"]
CODE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]+)[#)]")


def code_of(page: Path) -> list[str]:
    """The Python examples of a page."""
    return [textwrap.dedent(code) for _, code in CODE.findall(page.read_text())]


def test_the_page_of_errors_is_of_these_sources() -> None:
    assert errors.page() == errors.PAGE.read_text(), "run `make docs-pages`"


def test_messages_are_found_in_whatever_form_they_are_raised() -> None:
    source = """
LIMIT = 3
def f(name, n):
    if n: raise ValueError(f"{name} is above {LIMIT}")
    if name: raise TypeError("never " "so")
    warnings.warn(f"{n} at last", stacklevel=2)
    self._warn_once("key", "a sentence")
    yield "betas", "betas were changed"
    if n: raise ValueError("\\n".join(f"no field {each}" for each in n))
    raise ValueError(f"{name}: {n}")
    raise
"""
    found = {(message.text, message.kind) for message in errors.messages_of(source, "a.py")}
    assert found == {
        ("… is above 3", "ValueError"),
        ("never so", "TypeError"),
        ("no field …", "ValueError"),
        ("… at last", "warning"),
        ("a sentence", "warning"),
        ("betas were changed", "warning"),
    }


@pytest.mark.parametrize("package", ["automagic_core", "automagic_torch", "automagic_optax"])
def test_the_pages_of_the_api_list_every_public_name(package: str) -> None:
    page = (DOCS / "api" / f"{package.removeprefix('automagic_')}.md").read_text()
    listed = re.findall(rf"^::: {package}\.(?!integrations)(?:\w+\.)*(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(importlib.import_module(package).__all__)


def test_links_between_pages_lead_to_files() -> None:
    assert not [
        f"{page}: {target}"
        for page in [*PAGES, *DOCS.parent.glob("*.md")]
        for target in LINK.findall(CODE.sub("", page.read_text()))
        if not (page.parent / target).exists()
    ]


@pytest.mark.parametrize("page", OF_WHOLE_STATEMENTS, ids=lambda page: str(page.relative_to(DOCS)))
def test_examples_are_python(page: Path) -> None:
    for code in code_of(page):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("number", range(4))
def test_examples_of_the_first_page_run(number: int) -> None:
    known: dict[str, Any] = {}
    exec(code_of(DOCS / "getting-started.md")[number], known)
    assert "loss" not in known or math.isfinite(known["loss"].item())


def test_the_page_of_fields_has_every_field() -> None:
    named = set(re.findall(r"`(\w+)`", (DOCS / "fields.md").read_text()))
    assert set(FIELD_NAMES) <= named


def test_pictures_are_small() -> None:
    assert all(path.stat().st_size < 100_000 for path in (DOCS / "pictures").iterdir())
