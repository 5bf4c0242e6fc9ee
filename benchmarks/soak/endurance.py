"""Many steps on a small model: memory stays flat, and nothing becomes NaN or infinite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.soak.memory import LIMIT, Sample, drift, sample

STEPS = 50_000
WIDTH, RANK = 64, 4
"""A layer of 4,096 weights with an adapter, whose two arrays have one shape, and a bias."""
BATCH = 8
SAMPLES = 200
LEAST_SPACING = 10
"""Steps between two samples at least: collecting garbage takes as long as ten steps."""

FIELDS: dict[str, Any] = {
    "lr": 1e-4,
    "max_lr": 3e-3,
    "torque_decay": 0.9,
    "percentile_clipping": 95,
    "min_8bit_size": 1024,
    "force_8bit": True,
}
"""Every stage and every state is on; the layer's states are in 8 bits and those of the smaller arrays in 32."""


class Trained(NamedTuple):
    """One run as the loop sees it.

    Attributes:
        step: takes the step of this number, from 1 on, and returns its loss.
        all_finite: whether every parameter and every state is finite.
        step_count: the optimizer's own count.
    """

    step: Callable[[int], float]
    all_finite: Callable[[], bool]
    step_count: Callable[[], int]


def warmup_steps(steps: int) -> int:
    """It ends before memory is first compared."""
    return max(1, steps // 10)


def weights() -> dict[str, np.ndarray]:
    """The first parameters, in PyTorch's layout; float32."""
    rng = np.random.default_rng(0)
    shapes = {"layer": (WIDTH, WIDTH), "lora_a": (WIDTH, RANK), "lora_b": (WIDTH, RANK), "bias": (WIDTH,)}
    return {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def batches(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, the sines of a linear map of them with noise, both float32 (count, BATCH, WIDTH)."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, BATCH, WIDTH))
    clean = np.sin(x @ rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5)
    return x.astype(np.float32), (clean + 0.1 * rng.standard_normal(clean.shape)).astype(np.float32)


def endure(run: Trained, steps: int) -> dict[str, Any]:
    """Takes the steps.

    Returns:
        A record: what was measured, and under ``"failures"`` a sentence for everything that is not as it should be.
    """
    failures: list[str] = []
    samples: list[Sample] = []
    every = max(LEAST_SPACING, steps // SAMPLES)
    window = max(1, steps // 20)
    begin = time.perf_counter()
    first: list[float] = []
    last: list[float] = []
    bad_losses = 0
    for t in range(1, steps + 1):
        loss = run.step(t)
        bad_losses += not math.isfinite(loss)
        if t <= window:
            first.append(loss)
        if t > steps - window:
            last.append(loss)
        if t % every == 0:
            samples.append(sample(t))
            if not run.all_finite():
                failures.append(f"a parameter or a state is not finite after step {t}")
                break
    if bad_losses:
        failures.append(f"{bad_losses} losses are not finite")
    if not failures and not np.mean(last) < np.mean(first):
        failures.append(f"the loss did not fall: {np.mean(first):.4g} in the beginning, {np.mean(last):.4g} at the end")
    if not failures and run.step_count() != steps:
        failures.append(f"the optimizer counts {run.step_count()} steps instead of {steps}")
    record: dict[str, Any] = {"steps": steps, "seconds": time.perf_counter() - begin, "samples": len(samples)}
    if not failures:
        found = drift(samples, steps)
        if not found.flat:
            failures.append(
                f"memory grew by {found.resident:.2%} (own pages {found.own:.2%}, objects {found.objects:.2%}), "
                f"more than {LIMIT:.0%}"
            )
        record |= {"drift": found._asdict(), "first_loss": float(np.mean(first)), "last_loss": float(np.mean(last))}
    return record | {"failures": failures}
