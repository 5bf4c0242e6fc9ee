"""Prints what `make test-integrations` found as a page: ``python -m tests.integrations.table RESULTS.xml PAGE.md``."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

HEADER = """# Inside other libraries

`make test-integrations` installs each library in the versions of constraints-integrations.txt beside `.venv`, trains a
tiny model in it for a few steps, resumes from the library's own checkpoint and compares every bit of the parameters and
states with an uninterrupted run. It wrote this table, with torch {torch}, jax {jax} and optax {optax}, on a CPU:

| library | version | tried | passed | failed |
|---|---|---|---|---|
"""

FOOTER = """
- timm imports torchvision, which needs a build of its own for every build of torch. A stand-in takes its place where it
  is absent; the schedulers, parameter groups, Lookahead and vision transformer of the tests never call it.
- haliax 1.3, its last release, cannot be imported with this jax; the version tried is a development release.
- google-tunix asks for an older safetensors than `.venv` has, and trains with this one. Version 0.1.5, which goes with
  it, does not save the optimizer's state.
- Not tried whole: Levanter and EasyDeL (of each a part; their pages for maintainers say which). Not tried: MaxText,
  kohya's scripts, OneTrainer, ai-toolkit and diffusers' scripts, and what needs a GPU, as accelerate's float16 does.
"""


def facts(path: Path) -> tuple[str, tuple[str, ...]]:
    """What a test module says was tried, and the distributions that it names."""
    module = ast.parse(path.read_text())
    (names,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DISTRIBUTIONS"
    )
    return (ast.get_docstring(module) or "").replace("\n", " "), names


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def page(results: Path) -> str:
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        name = (case.get("classname") or case.get("name") or "").split(".")[-1]
        counts.setdefault(name or case.get("name", "").split(".")[-1], Counter())[outcome(case)] += 1
    rows = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        tried, names = facts(path)
        seen = counts.get(path.stem, Counter())
        versions = ", ".join(version(name) for name in names)
        rows.append(f"| {', '.join(names)} | {versions} | {tried} | {seen['passed']} | {seen['failed']} |")
    packages = {name: version(name).split("+")[0] for name in ("torch", "jax", "optax")}
    return HEADER.format(**packages) + "\n".join(rows) + "\n" + FOOTER


if __name__ == "__main__":
    text = page(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(text)
    print(text)
