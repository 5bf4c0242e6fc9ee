"""The page of parity says what the kept report says."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_distance_of_the_page_is_in_the_report() -> None:
    checks = json.loads((ROOT / "benchmarks/results/parity_cpu.json").read_text())["checks"]
    page = (ROOT / "docs/parity.md").read_text().replace("e-", "e-0")  # as Python writes it

    def most(*words: str) -> float:
        """The largest of the checks whose suite and name have all words."""
        return max(c["value"] for c in checks if all(word in f"{c['suite']}: {c['name']}" for word in words))

    def both(*words: str) -> str:
        return " / ".join(f"{most(*words, bits):.1e}" for bits in ("32-bit", "8-bit"))

    assert all(check["passed"] for check in checks)
    assert f"{len(checks)} bounds" in page
    assert f"| {most('teacher-forced', ': updates'):.1e} | 2e-06" in page
    assert f"| {most('teacher-forced', ': float32 states'):.1e} | 2e-06" in page
    assert both("Model", "largest distance of the loss curves") in page
    assert both("Carried runs", "largest distance") in page
    assert f"{most('Free-running', '32-bit, 1000'):.1e} / {most('Free-running', '8-bit, 1000'):.2f}" in page
    assert f"| {most('Model', 'mask on'):.3f} |" in page
