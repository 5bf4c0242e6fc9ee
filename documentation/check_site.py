"""Opens every page of out/site in a headless browser: ``make docs-check``

Each page is opened light and dark, 1280 and 390 pixels wide.  It fails on an error in the console, on anything fetched
from elsewhere, on a page that is wider than the window, on a picture that is not there, and on a search without a
result.  Screenshots lie in out/site-check.  The browser is a Chromium that is installed, ``CHROMIUM`` or on the path:
``apt-get install chromium`` brings one.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

SITE, SHOTS = Path("out/site"), Path("out/site-check")
WIDTHS = {"wide": 1280, "narrow": 390}
SCHEMES = ("light", "dark")
TALLEST_SHOT = 12_000
"""Pixels; of a taller page the first window is enough."""
FOUND_BY_SEARCH = "percentile"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

_MEASURE = """() => ({
    height: document.documentElement.scrollHeight,
    width: document.documentElement.scrollWidth,
    missing: [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.getAttribute("src")),
    undrawn: document.querySelectorAll(".arithmatex").length,
    empty: [...document.querySelectorAll("math")].filter(m => m.getBoundingClientRect().width == 0).length,
})"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a folder is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def faults_of(page: Page, address: str, path: str, shot: Path) -> list[str]:
    """Opens one page, takes its picture, and says what is wrong with it."""
    faults: list[str] = []
    heard = {
        "console": lambda said: faults.append(f"console: {said.text}") if said.type in ("error", "warning") else None,
        "pageerror": lambda error: faults.append(f"script: {error}"),
        "requestfailed": lambda request: faults.append(f"not loaded: {request.url}"),
        "request": lambda sent: None if sent.url.startswith((address, "data:", "blob:")) else faults.append(sent.url),
    }
    for event, hear in heard.items():
        page.on(event, hear)
    page.goto(address + path, wait_until="load")
    page.wait_for_timeout(150)  # scripts of the theme begin after the page has loaded
    found = page.evaluate(_MEASURE)
    window = page.viewport_size["width"]
    if found["width"] > window:
        faults.append(f"{found['width']} pixels wide in a window of {window}")
    faults += [f"no picture {name}" for name in found["missing"]]
    if found["undrawn"] or found["empty"]:
        faults.append(f"{found['undrawn']} formulas not drawn, {found['empty']} empty")
    shot.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=shot, full_page=found["height"] <= TALLEST_SHOT)
    for event, hear in heard.items():
        page.remove_listener(event, hear)
    return faults


def search_faults(context: BrowserContext, address: str) -> list[str]:
    """Looks for a word as a reader does."""
    page = context.new_page()
    page.goto(address + "index.html")
    page.keyboard.press("s")
    page.keyboard.type(FOUND_BY_SEARCH)
    try:
        page.wait_for_selector(".md-search-result__item", timeout=15_000)
    except Exception:
        return [f"the search finds nothing for {FOUND_BY_SEARCH!r}"]
    finally:
        page.close()
    return []


def check(browser: Browser, address: str, pages: list[str]) -> dict[str, list[str]]:
    """The faults of every page in every form."""
    faults: dict[str, list[str]] = {}
    for scheme in SCHEMES:
        for name, width in WIDTHS.items():
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            for path in pages:
                shot = SHOTS / f"{scheme}-{name}" / (path.removesuffix(".html").replace("/", "-") + ".png")
                faults[f"{path} ({scheme}, {name})"] = faults_of(page, address, path, shot)
            if scheme == SCHEMES[0]:
                faults[f"search ({name})"] = search_faults(context, address) if name == "wide" else []
            context.close()
    return {where: found for where, found in faults.items() if found}


def main() -> int:
    """Checks the site; 1 if something is wrong."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        print(f"no browser: none of {', '.join(NAMES)} is installed, and CHROMIUM names none")
        return 1
    pages = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
    with sync_playwright() as playwright, served(SITE) as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        faults = check(browser, address, pages)
        browser.close()
    for where, found in faults.items():
        print(f"{where}: " + "; ".join(found))
    print(f"{len(pages)} pages, each in {len(SCHEMES) * len(WIDTHS)} forms: {len(faults)} with faults; see {SHOTS}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
