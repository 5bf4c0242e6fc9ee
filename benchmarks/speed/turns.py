"""Times of several contestants that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.measuring import ROUND_SECONDS, ROUNDS, spread, steps_in_a_round

LEAST_ROUNDS = 3
Run = Callable[[int], float]
"""Does so many steps, waits for them, returns the seconds."""


def in_turn(runs: Mapping[str, Run], seconds: float) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step of each, already warmed up: median and spread over rounds through all of them.

    What else the machine does meanwhile meets them all alike.

    Args:
        seconds: how long rounds are begun, beyond the least number of rounds.
    """
    steps = {name: _steps(run) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for done in range(ROUNDS):
        if done >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        for name, run in runs.items():
            found[name].append(1e3 * run(steps[name]) / steps[name])
    return {name: spread(values) | {"steps_in_a_round": steps[name]} for name, values in found.items()}


def _steps(run: Run) -> int:
    first = run(1)
    # A short step may have met something else; a long one is not done twice to know that it is a round.
    return steps_in_a_round(first if first > ROUND_SECONDS else min(first, run(1)))
