"""The blocks of code in a page of docs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> dict[str, str]:
    """The blocks of a page by their place: its last heading, its language, and its number if there are more."""
    found: dict[str, str] = {}
    heading = ""
    heading_or_block = re.compile(r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for match in heading_or_block.finditer((DOCS / page).read_text()):
        if match[1]:
            heading = match[1].removeprefix("For maintainers: ")
            continue
        place = f"{heading}, {match[2]}"
        number = sum(known.startswith(place) for known in found)
        found[f"{place} {number + 1}" if number else place] = match[3]
    return found


def run(source: str, **names: Any) -> dict[str, Any]:
    """What a block defines; one branch of an `if` or a `match` is given its beginning."""
    if source.startswith("elif"):
        source = f"if False:\n    pass\n{source}"
    if source.startswith("case"):
        source = f"match kind:\n{textwrap.indent(source, '    ')}"
    exec(compile(source, "block", "exec", dont_inherit=True), names)
    return names
