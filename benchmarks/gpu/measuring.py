"""What the parts of ``make gpu`` share: their options, their record, medians with their spread."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROUNDS = 9
ROUND_SECONDS = 0.03
"""A round is as many steps as this takes, so that one wait for the device is shared by many short steps."""
MOST_STEPS = 50

SHAPES = ((16, 1280), (1280, 16), (32, 640), (640, 32))
"""Of adapters, in turn."""
Shapes = list[tuple[int, ...]]


def adapters(count: int) -> Shapes:
    """Shapes of that many adapters."""
    return [SHAPES[index % len(SHAPES)] for index in range(count)]


CASES: dict[str, Shapes] = {
    "100 M": [(10_000, 10_000)],
    "1,000 adapters": adapters(1000),
    "64 M": [(8192, 8192)],
    "200 adapters": adapters(200),
    "8 M": [(2048, 4096)],
    "1 M": [(1024, 1024)],
}
"""In the order in which they are measured; 1 M fits in a large card's cache."""
SMALL_CASES: dict[str, Shapes] = {"64 k": [(256, 256)], "8 adapters": adapters(8)}


def is_adapters(case: str) -> bool:
    """Whether the arrays of a case count as adapters."""
    return case.endswith("adapters")


class Record:
    """What a part has found so far, on disk after every entry: a part may be ended at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Adds an entry."""
        self.content[name] = value
        self._write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row to a list."""
        self.content.setdefault(name, []).append(row)
        print(json.dumps(row), flush=True)
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        part.replace(self.path)

    def tried(self, name: str, function: Callable[[], Any]) -> None:
        """Adds what a function returns, or what it raised."""
        try:
            value = function()
        except Exception as error:
            value = failure(error)
        self.put(name, value)
        print(f"{name}: {json.dumps(value)}", flush=True)


def failure(error: BaseException) -> dict[str, str]:
    """An exception as an entry of a record; its traceback goes to the log."""
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {error}"[:600]}


def options(doc: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of every part."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the code")
    parser.add_argument("--out", type=Path, required=True, help="the record, a JSON file")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--compile", metavar="I/N", help="torch: only the first steps of every N-th compiled case")
    return parser.parse_args(arguments)


def steps_in_a_round(seconds: float) -> int:
    """How many steps of so many seconds a round has."""
    return max(1, min(MOST_STEPS, round(ROUND_SECONDS / max(seconds, 1e-9))))


def spread(milliseconds: Sequence[float]) -> dict[str, Any]:
    """Median, least and most."""
    return {
        "ms": statistics.median(milliseconds),
        "ms_least": min(milliseconds),
        "ms_most": max(milliseconds),
        "rounds": len(milliseconds),
    }


def per_parameter(milliseconds: float, parameters: int, state_bytes: int) -> dict[str, float]:
    """Nanoseconds per parameter, and GB/s of the bytes that an update cannot do without.

    These are float32 parameters read and written, gradients read, states read and written.
    """
    needed = 12 * parameters + 2 * state_bytes
    return {"ns_per_parameter": 1e6 * milliseconds / parameters, "needed_GB_per_s": needed / milliseconds / 1e6}


class Clock:
    """How long a part has been running."""

    def __init__(self, limit: float) -> None:
        self.started = time.monotonic()
        self.limit = limit

    def is_over(self) -> bool:
        """Whether nothing new should begin."""
        return time.monotonic() - self.started > self.limit
