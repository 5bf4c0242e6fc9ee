"""Where the records lie: one file for each task, under benchmarks/results/soak."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER as RESULTS
from benchmarks.results import write

FOLDER = RESULTS / "soak"
_ROOT = Path(__file__).parents[2]


def save(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Keeps a record, with the machine, the versions, the date and the version of the sources."""
    write(folder / f"{name}.json", {"code": code_version(), **record})


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All records by their tasks' names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def has_passed(record: dict[str, Any] | None) -> bool:
    """Whether there is a record without failures, made with the present sources of the optimizer."""
    return record is not None and record["code"] == code_version() and not record["failures"]


@cache
def code_version() -> str:
    """A digest of the optimizer's sources."""
    found = hashlib.sha256()
    for package in ("automagic_core", "automagic_torch", "automagic_optax"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]
