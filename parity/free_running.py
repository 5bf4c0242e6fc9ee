"""Free-running parity: both sides start once from the same place and then go their own way.

Their distance is held against that of two torch runs, of which one sees gradients that are 1e-6 off, now up, now down:
so far apart may the two frameworks be after a single step.  With 8-bit states on a CPU it is 1e-5: there PyTorch rounds
codes through bitsandbytes' grid, whose points are 3e-5 apart, and JAX does not.  From then on a search may turn at
another step, in two torch runs as in JAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from parity.checks import Check, distance
from parity.sides import Arrays, JaxSide, TorchSide

SUITE = "Free-running"
MARKS = (1, 10, 100, 1000)
ALLOWANCE = 3
"""How many times the distance of the two torch runs."""
NUDGE = 1e-6
"""Half of the bound of a single step, `parity.teacher_forced.UPDATE_BOUND`."""
GRID_NUDGE = 1e-5
"""A third of the distance of two points of bitsandbytes' grid."""
FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "max_lr": 1e-2,
    "warmup_steps": 100,
    "weight_decay": 0.01,
    "min_8bit_size": 1024,
    "force_8bit": True,
}


class Problem:
    """A two-layer network on noisy linear data, its gradients in float64 numpy: the same function on both sides."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.target = rng.standard_normal((48, 96)) / 10
        self.hidden, self.inputs, self.outputs = 64, 96, 48
        self.start = [
            (rng.standard_normal((self.hidden, self.inputs)) / 10).astype(np.float32),
            np.zeros(self.hidden, np.float32),
            (rng.standard_normal((self.outputs, self.hidden)) / 8).astype(np.float32),
        ]

    def gradients(self, weights: Arrays, step: int) -> Arrays:
        """Of the mean squared error on a batch that depends on the step alone."""
        w1, b1, w2 = (np.asarray(w, np.float64) for w in weights)
        rng = np.random.default_rng(step + 1)
        x = rng.standard_normal((64, self.inputs))
        y = x @ self.target.T + 0.1 * rng.standard_normal((64, self.outputs))
        h = np.tanh(x @ w1.T + b1)
        out = (h @ w2.T - y) * (2 / y.size)
        back = (out @ w2) * (1 - h**2)
        return [np.asarray(g, np.float32) for g in (back.T @ x, back.sum(0), out.T @ h)]


def runs(fields: dict[str, Any], device: str, marks: tuple[int, ...]) -> dict[str, dict[int, Arrays]]:
    """What the updates have summed up to at each mark, in torch, in torch with other last digits, and in JAX."""
    problem, rng = Problem(), np.random.default_rng(5)
    nudge = GRID_NUDGE if device == "cpu" and fields.get("optim_bits", 8) == 8 else NUDGE

    def nudged(gradients: Arrays) -> Arrays:
        return [np.asarray(g * (1 + nudge * rng.choice([-1, 1], g.shape)), np.float32) for g in gradients]

    moved: dict[str, dict[int, Arrays]] = {}
    for name, seen in (("torch", list), ("torch, nudged", nudged)):
        side = TorchSide(problem.start, fields, device, "float32")
        updates = (side.step(seen(problem.gradients(side.weights(), step))) for step in range(1, max(marks) + 1))
        moved[name] = _sums(updates, marks)
    moved["JAX"] = _sums(_jax_updates(problem, fields, device, max(marks)), marks)
    return moved


def _jax_updates(problem: Problem, fields: dict[str, Any], device: str, steps: int) -> Iterator[Arrays]:
    side = JaxSide(fields, device, "float32")
    weights, state = problem.start, side.init(problem.start)
    for step in range(1, steps + 1):
        taken = side.step(problem.gradients(weights, step), state, weights)
        weights, state = taken.weights, taken.state
        yield taken.updates


def _sums(updates: Iterator[Arrays], marks: tuple[int, ...]) -> dict[int, Arrays]:
    """The sum of the float32 updates up to each mark, free of the rounding of the parameters."""
    total: list[np.ndarray] = []
    found = {}
    for step, update in enumerate(updates, start=1):
        update = [u.astype(np.float64) for u in update]
        total = [t + u for t, u in zip(total, update, strict=True)] if total else update
        if step in marks:
            found[step] = total
    return found


def suite(device: str, marks: tuple[int, ...] = MARKS) -> Iterable[Check]:
    """The checks of the report."""
    for bits in (32, 8):
        moved = runs({**FIELDS, "optim_bits": bits}, device, marks)
        for mark in marks:
            reference = moved["torch"][mark]
            ours = max(distance(a, b) for a, b in zip(moved["JAX"][mark], reference, strict=True))
            theirs = max(distance(a, b) for a, b in zip(moved["torch, nudged"][mark], reference, strict=True))
            kind = f"{bits}-bit, {mark} steps: distance of the summed updates (two torch runs: {theirs:.2g})"
            yield Check(SUITE, kind, ours, ALLOWANCE * theirs)
