"""The CPU part of docs/speed.md and the README's rows, all written from the figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from benchmarks.speed.cases import JAX, TORCH, is_ours
from benchmarks.speed.tables import Row, cases, fastest_peer, figure, for_page, measured

PICTURE = "docs/pictures/speed.png"
_PICTURED = "nanoseconds a parameter against the size of one array; milliseconds against the number of adapters"
BEGIN, END = "<!-- written by make bench -->", "<!-- up to here -->"
BUSY = 0.02
"""Of the cores' time, what other work took is said from here on."""


def with_tables(text: str, whole: dict[str, Any]) -> str:
    """docs/speed.md with these figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n" + "\n\n".join(_parts(whole)) + f"\n\n{END}{after}"


def with_rows(text: str, whole: dict[str, Any]) -> str:
    """The README with these figures: its rows that end with the command."""
    rows = "\n".join(readme_rows(whole))
    return re.sub(r"(?m)^\|.*\| `make bench` \|$(\n\|.*\| `make bench` \|$)*", lambda _: rows, text)


WRITERS = {"docs/speed.md": with_tables, "README.md": with_rows}


def _parts(whole: dict[str, Any]) -> Iterator[str]:
    rows, environment = whole["rows"], whole["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in {**environment["versions"], **whole["peers"]}.items())
    cores = environment["cores"]
    if whole["others"] is None:
        busy = " (not known whether other work ran on them)"
    else:
        share = whole["others"] / (cores * whole["seconds"])
        busy = f", of whose time other work took {100 * share:.0f} %" if share >= BUSY else ""
    yield (
        f"{environment['date']}; {environment['device']}, {cores} cores{busy}; {versions}. "
        "All contestants of a framework step the same arrays in turn; medians, ± half of the range."
    )
    yield f"![{_PICTURED}]({PICTURE.removeprefix('docs/')})"
    yield from verdicts(rows)
    yield (
        "**One array.** Nanoseconds and bytes are for each parameter, quotients, temporary memory and state for the "
        "largest array. Compiling in PyTorch is the first step less a later one."
    )
    for framework in (TORCH, JAX):
        yield for_page(whole, framework, adapters=False)
    yield (
        "**Adapters** of four shapes (16 × 1280, 1280 × 16, 32 × 640, 640 × 32). Milliseconds are for a step of all. "
        "Brackets: what had been compiled for fewer adapters could be used again."
    )
    for framework in (TORCH, JAX):
        yield for_page(whole, framework, adapters=True)
    yield (
        '“Stages on” damps edges and frequencies of all matrices, not of convolutions alone (`spatial_scope="all"`); '
        "“everything on” also clips by percentile and searches for the rate."
    )


def verdicts(rows: list[Row]) -> Iterator[str]:
    """Ours at its slowest and at its fastest, beside the fastest peer, at the largest sizes."""
    for adapters in (False, True):
        for framework in (TORCH, JAX):
            if found := compared(rows, framework, adapters):
                case, slow, fast, peer = found
                what = case if adapters else f"One array of {case}"
                yield (
                    f"{what}, {framework}: the slowest of ours, {_called(slow)}, takes {_times(slow, peer)} the "
                    f"time of the fastest peer, {_called(peer)}; the fastest of ours, {_called(fast)}, "
                    f"{_times(fast, peer)}."
                )


def compared(rows: list[Row], framework: str, adapters: bool) -> tuple[str, Row, Row, Row] | None:
    """The largest case; the slowest of ours there, the fastest, and the fastest peer."""
    for case in reversed(cases(rows, adapters)):
        ours = sorted(
            (row for row in measured(rows, framework=framework, case=case) if is_ours(row["name"])),
            key=lambda row: row["ms"],
        )
        peer = fastest_peer(rows, framework, case)
        if ours and peer:
            return case, ours[-1], ours[0], peer
    return None


def readme_rows(whole: dict[str, Any]) -> Iterator[str]:
    """Large arrays and many adapters on a CPU: kind and unkind."""
    for adapters in (False, True):
        for framework in (TORCH, JAX):
            if found := compared(whole["rows"], framework, adapters):
                case, slow, fast, peer = found
                what = f"{case}, one step" if adapters else f"one array of {case}"
                yield (
                    f"| a CPU, {what}, {framework} | {_called(fast)} {_times(fast, peer)} {_called(peer)} "
                    f"({_time(peer)}) | {_called(slow)} {_times(slow, peer)} | `make bench` |"
                )


def _called(row: Row) -> str:
    return str(row["name"]).removeprefix("ours, ")


def _times(row: Row, peer: Row) -> str:
    return f"{figure(row['ms'] / peer['ms'])} ×"


def _time(row: Row) -> str:
    if row["adapters"]:
        return f"{figure(row['ms'])} ms"
    return f"{figure(1e6 * row['ms'] / row['parameters'])} ns a parameter"
