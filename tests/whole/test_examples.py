"""The gallery: every example is short, says what it is, and stands on its page and in `make examples`.  None is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from automagic_core import Config
from examples import __main__ as runner
from examples.digits_diffusion.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/gallery.md").read_text()
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_one_short_file_that_says_what_it_does(script: Path) -> None:
    text = script.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) < 120
    assert f"``python -m examples.{script.stem}``" in (ast.get_docstring(tree) or "")
    assert f"out/examples/{script.stem}.png" in text
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] in ("examples", "benchmarks", "tests")]
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    doc, first = main.body[0], main.body[1]
    assert isinstance(doc, ast.Expr)
    assert ast.unparse(first).startswith("print("), "it says first what it will do"
    assert "minute" in ast.unparse(first), "and how long it takes"
    assert "Seen: " in text


def test_the_page_shows_what_make_examples_runs() -> None:
    assert [script.stem for script in SCRIPTS] == runner.SCRIPTS
    commands = re.findall(r"^python -m examples\.(\w+)$", PAGE, re.MULTILINE)
    assert sorted(commands) == sorted([runner.DEMO, *runner.SCRIPTS])
    shown = re.findall(r"\]\(pictures/(gallery-[\w-]+\.png)\)", PAGE)
    assert sorted(shown) == sorted(runner.PICTURES)
    assert sorted(path.name for path in (ROOT / "docs/pictures").glob("gallery-*")) == sorted(shown)
    assert all((ROOT / "docs/pictures" / name).stat().st_size < 80_000 for name in shown)
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^examples:.*\n\t.* -m examples( |$)", makefile, re.MULTILINE)


def test_the_demo_starts_where_the_optimizer_does() -> None:
    assert Settings().starting_rate == Config().lr
