"""Writes docs/errors.md, every message that the packages raise or warn with: ``python -m documentation.errors``

The messages are read from the sources.  What helps stands in cures.toml, by a part of the message.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("automagic_core", "automagic_torch", "automagic_optax", "automagic_cameamp_improved_8bit")
PAGE, CURES = ROOT / "docs/errors.md", Path(__file__).with_name("cures.toml")
HOLE = "…"
NOT_MESSAGES = ("KeyError(key)", "AttributeError(")
"""What code, not a person, is meant to see."""
FROM_OTHERS = {
    "NO_PARAMS_MSG": "You are using a transformation that requires the current value of parameters, but you are not "
    "passing `params` when calling `update`."
}
"""Messages that stand in another library under a name."""
VALID = "Give one of the values that the message names after “valid”."

_HEAD = """# Errors and warnings

Every message of the packages, with what helps. … stands for what differs from case to case. Search this page for some
words of the message that you have.

Generated from the sources by `make docs-pages`.
"""


class Message(NamedTuple):
    """One message.

    Attributes:
        text: its words, with a hole for each value.
        kind: the name of the exception, or ``"warning"``.
        path: of the module, from the root on.
    """

    text: str
    kind: str
    path: str


def messages() -> list[Message]:
    """All messages in the order of packages, modules and lines, each once a module."""
    found: dict[Message, None] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found |= dict.fromkeys(messages_of(path.read_text(), str(path.relative_to(ROOT))))
    return list(found)


def messages_of(source: str, path: str) -> Iterator[Message]:
    """The messages of one module."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    } | FROM_OTHERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):  # a name, and what to warn of
            yield Message(_text(node.value.elts[-1], constants), "warning", path)
        call: Any = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args or ast.unparse(call).startswith(NOT_MESSAGES):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        warns = name in ("warn", "_warn_once")
        if not warns and not isinstance(node, ast.Raise):
            continue
        text = _text(call.args[-1] if name == "_warn_once" else call.args[0], constants)
        # A sentence that was composed elsewhere leaves nothing but a hole.
        if text.strip(f"{HOLE}: "):
            yield Message(text, "warning" if warns else name, path)


def _text(node: ast.expr, constants: dict[str, Any]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        each: Any = node.args[0]  # one line for each of several values
        return _text(each.elt, constants) if isinstance(each, ast.GeneratorExp) else HOLE
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.Name) and isinstance(constants.get(node.id), (str, int)):
        return str(constants[node.id])
    return HOLE


def page() -> str:
    """The page.

    Raises:
        ValueError: a message has no cure, or a cure belongs to no message.
    """
    sections = tomllib.loads(CURES.read_text())["section"]
    rows: dict[str, list[str]] = {section["title"]: [] for section in sections}
    used: set[tuple[str, str]] = set()
    faults = []
    for text, kind, path in messages():
        section = max(sections, key=lambda each: max(len(part) if part in path else -1 for part in each["files"]))
        part = next((part for part in section["cures"] if part in text), None)
        if part is None and "valid:" not in text:
            faults.append(f"no cure: {path}: {text}")
            continue
        used.add((section["title"], part or ""))
        shown = text.replace("|", "\\|").replace("`", "'")
        row = f"| `{shown}` | {kind} | {section['cures'][part] if part else VALID} |"
        if row not in rows[section["title"]]:
            rows[section["title"]].append(row)
    faults += [
        f"no message has this cure: {section['title']}: {part}"
        for section in sections
        for part in section["cures"]
        if (section["title"], part) not in used
    ]
    if faults:
        raise ValueError(f"{CURES.name} and the sources do not fit:\n" + "\n".join(faults))
    parts = [_HEAD]
    for section in sections:
        intro = [section["intro"], ""] if "intro" in section else []
        head = ["| message | kind | what helps |", "|---|---|---|"]
        parts.append("\n".join([f"## {section['title']}", "", *intro, *head, *rows[section["title"]], ""]))
    return "\n".join(parts)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}: {len(messages())} messages\n")


if __name__ == "__main__":
    main()
