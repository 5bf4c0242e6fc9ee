"""`training_health` and `memory_table` on made-up facts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from automagic_core.watching.health import OptimizerFacts, training_health
from automagic_core.watching.memory_table import HeldStates, memory_table

FINE = OptimizerFacts(skipped=0, taken=1000, memory_use=None, rates=None)
FULL = FINE._replace(memory_use=0.91)
T = np.arange(200)
NOISE = np.random.default_rng(0).standard_normal(200)
FALLING = np.exp(-T / 100) * (1 + 0.05 * NOISE)


@pytest.mark.parametrize(
    ("losses", "facts", "status", "issues"),
    [
        (FALLING, FINE, "healthy", []),
        (FALLING, FINE._replace(memory_use=0.89, skipped=9), "healthy", []),
        (FALLING, FULL, "warning", ["memory_pressure"]),
        (FALLING, FINE._replace(skipped=20), "warning", ["skipped_steps"]),
        (FALLING, FINE._replace(skipped=200), "critical", ["skipped_steps"]),
        (1 + 0.05 * NOISE, FINE, "warning", ["convergence_stall"]),
        # 5 % between the halves: less than a tenth.
        ((1 - 5e-4 * T) * (1 + 0.01 * NOISE), FINE, "warning", ["convergence_stall"]),
        (np.abs(1 + NOISE), FINE, "healthy", []),
        ((1 + T / 200) * (1 + 0.05 * NOISE), FINE, "critical", ["divergence"]),
        (
            np.where(T == 7, np.nan, FALLING),
            FINE._replace(memory_use=0.95),
            "critical",
            ["divergence", "memory_pressure"],
        ),
        (np.where(NOISE > 1.5, 50, FALLING), FINE, "healthy", []),
    ],
)
def test_status(losses: Any, facts: OptimizerFacts, status: str, issues: list[str]) -> None:
    health = training_health(losses, facts, 0.1)
    assert (health["status"], health["issues"]) == (status, issues)
    assert len(health["suggestions"]) == len(issues)


def test_the_ratio_is_the_change_that_counts() -> None:
    slow = (1 - 5e-4 * T) * (1 + 0.01 * NOISE)
    assert training_health(slow, FINE, 0.01)["status"] == "healthy"
    assert training_health(slow[::-1], FINE, 0.01)["issues"] == ["divergence"]
    assert training_health(slow[::-1], FINE, 0.1)["issues"] == ["convergence_stall"]
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=r"threshold_ratio = .* valid: a number in \(0, 1\)"):
            training_health(slow, FINE, wrong)


def test_few_losses_are_not_judged_but_seen() -> None:
    health = training_health([1.0] * 9, FINE, 0.1)
    assert (health["status"], health["issues"]) == ("healthy", [])
    assert health["suggestions"] == ["9 losses are too few to judge: at least 10 are needed."]
    assert training_health([1.0, np.inf], FINE, 0.1)["status"] == "critical"
    assert training_health([], FINE, 0.1)["status"] == "healthy"


HELD = HeldStates(900_000, 80_000, 20_000, {"exp_avg": 950_000, "exp_avg_sq": 50_000}, None)


def test_the_table_adds_up() -> None:
    lines = memory_table(HELD).splitlines()
    cells = {line[:24].strip(): line[24:].split() for line in lines}
    assert cells["parameters"] == ["1,000,000"]
    assert cells["with 8-bit states"] == ["900,000", "90.0", "%"]
    assert cells["exp_avg"] == ["950,000", "95.0", "%"]
    assert cells["all states"] == ["1,000,000", "12.8", "%", "of", "Adam's"]
    assert cells["Adam's states"] == [f"{8 * 980_000:,}"]
    assert cells["saved"] == [f"{8 * 980_000 - 1_000_000:,}"]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Very good: 91.8% of the parameters have 8-bit states."),
        ({"eight_bit": 50_000, "thirty_two_bit": 50_000}, "50.0% of the parameters have 8-bit states."),
        ({"eight_bit": 20_000}, "Warning: only 20.0% of the parameters have 8-bit states."),
        ({"eight_bit": 0}, "Warning: only 0.0%"),
        ({"eight_bit": 0, "kept_in_32": "optim_bits=32 asks for it"}, "All states are in 32 bits: optim_bits=32"),
        ({"eight_bit": 0, "thirty_two_bit": 0, "kept_in_32": "of a reason"}, "No states yet"),
    ],
)
def test_the_verdict(changes: dict[str, Any], said: str) -> None:
    assert memory_table(HELD._replace(**changes)).splitlines()[-1].startswith(said)
