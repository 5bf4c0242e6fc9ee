"""The figures as tables: one for the terminal, two for a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks.evidence import markdown
from benchmarks.speed.cases import is_ours

Row = dict[str, Any]
ByCase = Mapping[str, Row]


class Column(NamedTuple):
    """A heading, and what a contestant's rows, by case, show under it."""

    heading: str
    cell: Callable[[ByCase], str]


def measured(rows: list[Row], **wanted: Any) -> list[Row]:
    """Rows with a time, of a framework, a case and so on."""
    return [row for row in rows if "ms" in row and all(row[key] == value for key, value in wanted.items())]


def cases(rows: list[Row], adapters: bool) -> list[str]:
    """The cases of one kind in growing order."""
    sizes = {row["case"]: row["parameters"] for row in rows if row["adapters"] == adapters}
    return sorted(sizes, key=lambda name: sizes[name])


def fastest_peer(rows: list[Row], framework: str, case: str) -> Row | None:
    """Of the others, the one that takes the least time."""
    found = [row for row in measured(rows, framework=framework, case=case) if not is_ours(row["name"])]
    return min(found, key=lambda row: row["ms"], default=None)


def columns(rows: list[Row], adapters: bool) -> list[Column]:
    """Of one kind of cases; the largest has its quotient, memory and state."""
    names = cases(rows, adapters)
    if not names:
        return []
    largest = names[-1]
    found = [Column(f"{'ms' if adapters else 'ns'}, {name}", _time(name)) for name in names]
    found.append(Column("× fastest peer", _quotient(rows, largest)))
    found += [Column(f"compile s, {name}", _compile(name)) for name in (names if adapters else names[:1])]
    if not adapters:
        found.append(Column("temporary bytes", _bytes(largest, "peak_bytes")))
        found.append(Column("state bytes", _bytes(largest, "state_bytes")))
    return found


def entries(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """The rows of each contestant, by framework and name, and then by case."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["framework"], row["name"]), {})[row["case"]] = row
    return found


def terminal(whole: dict[str, Any]) -> Table:
    """Everything, one line for each contestant."""
    rows = whole["rows"]
    both = columns(rows, False) + columns(rows, True)
    shown = Table(title="one step; ns and bytes are for each parameter of one array, ms for all adapters")
    for heading in ("", *(column.heading for column in both)):
        shown.add_column(heading, justify="right" if heading else "left")
    before = ""
    for (framework, name), by_case in entries(rows).items():
        if framework != before:
            shown.add_section()
            shown.add_row(f"[bold]{framework}")
            before = framework
        shown.add_row(name, *_cells(by_case, both))
    return shown


def for_page(whole: dict[str, Any], framework: str, adapters: bool) -> str:
    """One kind of cases of one framework, in Markdown."""
    rows = [row for row in whole["rows"] if row["framework"] == framework and row["adapters"] == adapters]
    shown = columns(rows, adapters)
    lines = [[name, *_cells(by_case, shown)] for (_, name), by_case in entries(rows).items()]
    return markdown.table([framework, *(column.heading for column in shown)], lines)


def _cells(by_case: ByCase, shown: list[Column]) -> list[str]:
    """What was never measured says why in the first cell."""
    if not any("ms" in row for row in by_case.values()):
        return [next(iter(by_case.values()))["error"][:60], *[""] * (len(shown) - 1)]
    return [column.cell(by_case) for column in shown]


def figure(value: float) -> str:
    """Two digits that count, three from 10 on, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2g}"


def _cell(case: str, text: Callable[[Row], str]) -> Callable[[ByCase], str]:
    def cell(by_case: ByCase) -> str:
        row = by_case.get(case)
        if row is None:
            return ""
        return text(row) if "ms" in row else row["error"].split(":")[0]

    return cell


def _time(case: str) -> Callable[[ByCase], str]:
    def text(row: Row) -> str:
        time = row["ms"] if row["adapters"] else 1e6 * row["ms"] / row["parameters"]
        return f"{figure(time)} ±{50 * (row['ms_most'] - row['ms_least']) / row['ms']:.0f} %"

    return _cell(case, text)


def _quotient(rows: list[Row], case: str) -> Callable[[ByCase], str]:
    def text(row: Row) -> str:
        peer = fastest_peer(rows, row["framework"], case)
        return "" if peer is None else figure(row["ms"] / peer["ms"])

    return _cell(case, text)


def _compile(case: str) -> Callable[[ByCase], str]:
    def text(row: Row) -> str:
        seconds = f"{row['compile_seconds']:.1f}"
        return seconds if row["cold"] else f"({seconds})"

    return _cell(case, text)


def _bytes(case: str, key: str) -> Callable[[ByCase], str]:
    return _cell(case, lambda row: "" if row[key] is None else f"{row[key] / row['parameters']:.1f}")
