"""What mkdocs does beside its own work: formulas, pages that lie outside of docs/, and what must not be missing.

A warning ends a strict build, so each check here logs one.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PACKAGES = ("automagic_core", "automagic_torch", "automagic_optax")
PAGES_ELSEWHERE = {
    "benchmarks/evidence/tried.md": "tried.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
"""Where a page of the repository stands on the site.  README.md does not: the site has a first page of its own."""

_LINK = re.compile(r"(\]\()([^)#:\s]+)([#)])")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_UNKNOWN = re.compile(r">(\\\w+|&)<")
"""What latex2mathml leaves of a command that it does not know."""
_PICTURE = re.compile(r'(<img [^>]*src="([^"]+)"[^>]*>)')
_log = logging.getLogger("mkdocs.documentation")


def on_config(config: Any) -> Any:
    """Puts the pages of a folder where the navigation names the folder."""
    config.nav = [{title: _expanded(entries)} for section in config.nav for title, entries in section.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie elsewhere."""
    for path, uri in PAGES_ELSEWHERE.items():
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Makes links between pages of the repository links between pages of the site."""
    place = {uri: path for path, uri in PAGES_ELSEWHERE.items() if uri != "index.md"}
    folder = posixpath.dirname(place.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        uri = PAGES_ELSEWHERE.get(target, target.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return match[0]
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return _LINK.sub(linked, markdown)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Turns formulas into MathML, which browsers draw without a script or a font of ours, and pictures into links."""

    def drawn(match: re.Match[str]) -> str:
        # latex2mathml does not know "aligned"; "split" is the same.
        tag, text = match[1], html.unescape(match[2]).strip().replace("{aligned}", "{split}")
        block = text.startswith("\\[")
        try:
            formula = latex2mathml.converter.convert(text[2:-2], display="block" if block else "inline")
        except Exception as error:  # of whatever kind: the reader must know which formula it was
            _log.warning("%s: a formula cannot be drawn (%r): %s", page.file.src_uri, error, text)
            return match[0]
        if unknown := _UNKNOWN.search(formula):
            _log.warning("%s: %s has no meaning in this formula: %s", page.file.src_uri, unknown[1], text)
        return f'<{tag} class="formula">{formula}</{tag}>'

    # A picture opens by itself: on a phone it is small.
    return _PICTURE.sub(r'<a href="\2">\1</a>', _FORMULA.sub(drawn, content))


def on_env(env: Any, config: Any, files: Any) -> Any:
    """Says which public names have no docstring or stand on no page of the API."""
    loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
    for package in PACKAGES:
        loader.load(package)
    loader.resolve_aliases()
    for package in PACKAGES:
        module = loader.modules_collection[package]
        page = Path(config.docs_dir, "api", f"{package.removeprefix('automagic_')}.md").read_text()
        paths = re.findall(rf"^::: ({package}\.[\w.]+)$", page, re.MULTILINE)
        listed = {path.rpartition(".")[2] for path in paths}
        for path in paths:
            if loader.modules_collection[path].is_module:
                _log.warning("%s is a module too: name what is in it", path)
        public = {str(name) for name in module.exports or ()}
        for name in sorted(public - listed):
            _log.warning("%s.%s stands on no page of the API", package, name)
        for name in sorted(public):
            if not module[name].has_docstring:
                _log.warning("%s.%s has no docstring", package, name)
    return env


def _expanded(entries: list[Any]) -> list[Any]:
    """A section of the navigation with each folder replaced by its pages."""
    pages: list[Any] = []
    for entry in entries:
        if isinstance(entry, str) and entry.endswith("/"):
            pages += sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs" / entry).glob("*.md"))
        else:
            pages.append(entry)
    return pages
