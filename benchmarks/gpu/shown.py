"""The short table at the end of ``make gpu``, in plain text."""

from __future__ import annotations

from typing import Any


def table(results: dict[str, Any]) -> str:
    """Everything that fits on a page: what ended how, bounds exceeded, tests failed, times."""
    lines = ["", f"after {results.get('seconds')} s on {results['device']}"]
    parts = results["parts"]
    for name, part in parts.items():
        lines += [f"- {name}: {part['ended']}, {part['seconds']} s{_short(part)}"]
        lines += _wrong(part)
    lines += _facts(parts.get("facts", {}).get("found", {}))
    for name in ("torch_speed", "jax_speed"):
        lines += speeds(parts.get(name, {}).get("found", {}).get("rows", []))
    lines += _rest(parts)
    return "\n".join(lines)


def _short(part: dict[str, Any]) -> str:
    if tests := part.get("tests"):
        return f"; tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    if parity := part.get("parity"):
        kept = sum(check["passed"] for check in parity["checks"])
        return f"; {kept} of {len(parity['checks'])} bounds kept"
    return ""


def _wrong(part: dict[str, Any]) -> list[str]:
    names = list(part.get("tests", {}).get("failures", {}))[:8]
    exceeded = [check for check in part.get("parity", {}).get("checks", []) if not check["passed"]][:6]
    return [f"    failed: {name}" for name in names] + [
        f"    exceeded: {check['name']}: {check['value']:.3g} (bound {check['bound']:.3g})" for check in exceeded
    ]


def _facts(facts: dict[str, Any]) -> list[str]:
    lines = []
    if card := facts.get("card"):
        lines.append(f"{card.get('name')}, {facts.get('versions')}")
    for name in ("copy_torch", "copy_jax"):
        if "GB_per_s" in facts.get(name, {}):
            lines.append(f"{name}: {facts[name]['GB_per_s']:.0f} GB/s")
    lines += [f"import {name}: {how}" for name, how in facts.get("imports", {}).items() if not how.startswith("ok")]
    lines += [f"{name}: {how}" for name, how in facts.items() if name.startswith("rounding")]
    return lines


def speeds(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each optimizer and case."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [
            "",
            f"{rows[0]['framework']}, {case}: ms (least–most), ns/parameter, GB/s, peak MB, state MB, first s",
        ]
        for row in (row for row in rows if row["case"] == case):
            if "ms" not in row or "error" in row:
                lines.append(f"  {row['name']:28} {row.get('error', '')[:90]}")
                continue
            seconds = row.get("compile_seconds", row.get("first_step_seconds", 0.0))
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"  {row['name']:28} {row['ms']:9.3f} ({row['ms_least']:.3f}–{row['ms_most']:.3f}) "
                f"{row['ns_per_parameter']:8.4f} {row['needed_GB_per_s']:7.0f} {peak:>6} "
                f"{row['state_bytes'] / 1e6:6.0f} {seconds:6.1f}"
            )
    return lines


def _rest(parts: dict[str, Any]) -> list[str]:
    lines = [""]
    for name, value in parts.get("places", {}).get("found", {}).items():
        if isinstance(value, dict) and "beside" in value:
            value = {place: round(value[place]["ms"], 3) for place in ("beside", "host")}
        elif isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if key != "metrics"}
        lines.append(f"{name}: {value}")
    sums = parts.get("float64_sums", {}).get("found", {})
    for row in sums.get("rows", []):
        lines.append(f"{row['case']}, {row['name']}, {row['sums']} sums: {row.get('ms', row.get('error'))} ms")
    for name, row in sums.get("sums alone", {}).items():
        lines.append(f"sum over {name}: {row['ms'] if isinstance(row, dict) else row} ms")
    return lines
