"""What must hold in every random run, whichever framework took its steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from automagic_core import Config
from benchmarks.soak.fuzz_cases import Case, as_float, is_quantized, usable
from tests.oracle.cameamp import CameampOracle
from tests.oracle.settings import DEFAULTS

ORACLE_TOLERANCE = 1e-4
"""‖a − b‖ / ‖b‖ of an update.  Four steps of float32 have some hundred roundings of 6e-8, which eigenvectors and
differences of neighbours enlarge; a slip in a formula is far above this."""
LEAST_UPDATE = 1e-3
"""Norms count as at least this much of that of an update that moves every element by the rate: below it lie the
rounding errors of what should cancel."""
_UNITS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-23}
"""An ulp relative to the number; float64 parameters get float32 updates."""
_LEAST = {"float32": 1e-44, "bfloat16": 1e-40, "float16": 1e-7, "float64": 1e-44}


class Runner(Protocol):
    """A case's run in one framework."""

    everywhere: bool
    """8-bit states need no `force_8bit`."""
    counts_from_first_gradient: bool
    """Calls before it are no steps (section 1.5 of docs/algorithm.md)."""
    flushes: bool
    """Subnormal parameters become zeros when anything is added to them, as XLA does it on a CPU."""

    def step(self, gradients: list[Any]) -> list[np.ndarray | None]:
        """Takes a step; the float32 updates, where they are known before rounding."""

    def weights(self) -> list[np.ndarray]:
        """Copies of the parameters, in their dtypes."""

    def states(self, i: int) -> dict[str, np.ndarray]:
        """Copies of an array's states by name; empty before its first step."""


@dataclass
class Tally:
    """What was looked at."""

    counts: Counter[str] = field(default_factory=Counter)
    largest_distance: float = 0.0


def check_case(case: Case, runner: Runner, tally: Tally) -> None:
    """Takes all steps of a run.

    Raises:
        AssertionError: says what does not hold.
    """
    config = case.config
    oracle = _oracle(case, config, runner)
    tally.counts["cases"] += 1
    tally.counts["compared with the oracle"] += oracle is not None
    tally.counts["with 8-bit states"] += any(is_quantized(case, a, everywhere=runner.everywhere) for a in case.arrays)
    for a in case.arrays:
        tally.counts[f"{len(a.shape)}-d"] += 1
        tally.counts[a.dtype] += 1
        tally.counts["empty arrays"] += 0 in a.shape
    for t in range(1, len(case.steps) + 1):
        gradients = case.gradients(t)
        before = runner.weights()
        states = [runner.states(i) for i in range(len(before))]
        expected = None if oracle is None else oracle.step_(gradients, before)
        updates = runner.step(gradients)
        after = runner.weights()
        tally.counts["steps"] += 1
        for i, g in enumerate(gradients):
            where = f"step {t}, array {i}"
            if g is None or g.size == 0 or not usable(g):
                tally.counts["skipped"] += g is not None and g.size > 0
                old = flushed(before[i]) if runner.flushes else before[i]
                new = flushed(after[i]) if runner.flushes else after[i]
                _check_untouched(old, new, states[i], runner.states(i), g, where)
            else:
                _check_moved(case, config, i, before[i], after[i], where)
                _check_states(runner.states(i), where)
            if expected is not None and updates[i] is not None and expected[i].size:
                found = distance(updates[i], expected[i], config)
                tally.largest_distance = max(tally.largest_distance, found)
                assert found <= ORACLE_TOLERANCE, f"{where}: {found:.2g} from the oracle's update"


def distance(ours: Any, theirs: np.ndarray, config: Config) -> float:
    """Relative distance of two updates."""
    least = LEAST_UPDATE * config.min_lr * np.sqrt(theirs.size)
    return float(np.linalg.norm(as_float(ours) - theirs) / max(np.linalg.norm(theirs), least))


def flushed(x: np.ndarray) -> np.ndarray:
    """The array with zeros of the same sign for its subnormal numbers."""
    tiny = np.finfo(np.float32).tiny
    return np.where(np.abs(as_float(x)) < tiny, np.copysign(np.zeros_like(x), x), x)


def _oracle(case: Case, config: Config, runner: Runner) -> CameampOracle | None:
    if not case.tame or any(is_quantized(case, a, everywhere=runner.everywhere) for a in case.arrays):
        return None
    return CameampOracle(
        [a.shape for a in case.arrays],
        layout=case.layout,
        of_torch=runner.counts_from_first_gradient,
        embedding=[a.embedding for a in case.arrays],
        lora=[a.lora and len(a.shape) == 2 for a in case.arrays],
        **{name: value for name, value in config.__dict__.items() if name in DEFAULTS},
    )


def _check_untouched(
    before: np.ndarray,
    after: np.ndarray,
    old: dict[str, np.ndarray],
    new: dict[str, np.ndarray],
    g: np.ndarray | None,
    where: str,
) -> None:
    """Section 6: every bit of parameter and states stays, but for skipped steps and the walk of an absent array."""
    assert before.tobytes() == after.tobytes(), f"{where}: a parameter without a usable gradient moved"
    skipped = int(g is not None and g.size > 0)
    if not old:  # an array gets its states in its first call
        assert not new or (int(new["age"]), int(new["skipped_steps"])) == (0, skipped), f"{where}: it aged"
        return
    assert int(new["skipped_steps"]) == int(old["skipped_steps"]) + skipped, f"{where}: wrong count of skipped steps"
    # After its warm-up an array's warm-up states are dropped in any call.
    for name in set(new) - {"skipped_steps"}:
        # In the climb the walk of an array that is not there becomes 0 (section 5.8).
        ended = name == "walk" and not skipped and not new[name].any()
        assert ended or new[name].tobytes() == old[name].tobytes(), f"{where}: {name} changed"


def _check_moved(case: Case, config: Config, i: int, before: np.ndarray, after: np.ndarray, where: str) -> None:
    """The parameter is finite and moved no further than its rate lets it."""
    old, new = as_float(before), as_float(after)
    assert np.isfinite(new).all(), f"{where}: a parameter is not finite"
    # |m̂| ≤ update_clip and r̂ ≥ 0; τ / τ̄ ≤ 1 / 0.05; b < 2.
    longest = config.update_clip / np.sqrt(config.confidence_floor) * (20 if config.torque else 1)
    # The spatial factor may double a rate, whatever its limits are.
    bound = 2 * config.max_lr * (longest + 2 * config.weight_decay * np.abs(old))
    dtype = case.arrays[i].dtype
    rounding = 2 * _UNITS[dtype] * (np.abs(old) + bound) + _LEAST[dtype]
    excess = np.abs(new - old) - 1.001 * bound - rounding
    assert np.all(excess <= 0), f"{where}: moved {np.abs(new - old).max():.3g}, further than the rate allows"


def _check_states(states: dict[str, np.ndarray], where: str) -> None:
    for name, value in states.items():
        assert np.isfinite(as_float(value)).all(), f"{where}: state {name} is not finite"
