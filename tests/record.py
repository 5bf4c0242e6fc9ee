"""Keeps what `make test-all` found: ``python -m tests.record JUNIT.xml JSON``."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.results import write
from benchmarks.soak.store import code_version
from tests.integrations.table import outcome


def record(results: Path) -> dict[str, object]:
    """Counts of outcomes, in all and by folder, and the names of what failed; `code` is of the optimizer's sources."""
    cases = [(f"{case.get('classname')}.{case.get('name')}", outcome(case)) for case in _cases(results)]
    folders: dict[str, Counter[str]] = {}
    for name, came in cases:
        folders.setdefault(name.split(".")[1], Counter())[came] += 1
    return {
        "code": code_version(),
        **{kind: sum(came == kind for _, came in cases) for kind in ("passed", "failed", "skipped")},
        "seconds": round(sum(float(case.get("time", 0)) for case in _cases(results))),
        "failures": [name for name, came in cases if came == "failed"],
        "folders": {name: dict(counts) for name, counts in sorted(folders.items())},
    }


def _cases(results: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(results).iter("testcase"))


if __name__ == "__main__":
    write(Path(sys.argv[2]), record(Path(sys.argv[1])))
