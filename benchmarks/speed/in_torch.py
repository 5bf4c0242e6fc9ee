"""One case in PyTorch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contestants.in_torch import PEERS, Make, ours
from benchmarks.gpu.measuring import failure
from benchmarks.speed import torch_memory
from benchmarks.speed.cases import Case, is_ours
from benchmarks.speed.turns import in_turn


def maker(name: str) -> Make:
    """An entry of `cases.NAMES`."""
    if not is_ours(name):
        return PEERS[name]
    which, _, how = name.removeprefix("ours, ").rpartition(", ")
    return ours(which, compiled=how == "compiled")


class Entered:
    """An optimizer after its first steps.

    All step the same arrays, so that a large one is held once.

    Args:
        values, grads: float32 tensors; the parameters share their storages.
    """

    def __init__(self, make: Make, values: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], lora: bool) -> None:
        params = [torch.nn.Parameter(value) for value in values]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
            p._is_lora_layer = lora  # type: ignore[attr-defined]
        before = torch_memory.held_bytes()
        self.optimizer = make(params)
        self.first = self.run(1)
        self.state_bytes = torch_memory.state_bytes(self.optimizer)
        kept = max(0, torch_memory.held_bytes() - before - self.state_bytes)
        self.peak_bytes = kept + torch_memory.peak_of(self.optimizer.step)

    def run(self, steps: int) -> float:
        """Seconds of some steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.step()
        return time.perf_counter() - started


def measure(case: Case, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each name."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).mul_(0.02) for shape in case.shapes]
    grads = [torch.randn(shape, generator=generator).mul_(1e-3) for shape in case.shapes]
    if any(name.endswith("compiled") for name in names):
        # What is loaded for the first program is not counted to the first contestant.
        torch.compile(lambda x: x + 1)(torch.ones(2))
    entered: dict[str, Entered] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            entered[name] = Entered(maker(name), values, grads, case.adapters)
        except Exception as error:
            rows[name] = failure(error)
    found = in_turn({name: each.run for name, each in entered.items()}, case.seconds)
    for name, each in entered.items():
        rows[name] = found[name] | {
            "compile_seconds": max(0.0, each.first - found[name]["ms"] / 1e3),
            "state_bytes": each.state_bytes,
            "peak_bytes": each.peak_bytes,
        }
    if not all(bool(value.isfinite().all()) for value in values):
        raise FloatingPointError("parameters are not finite")
    return [{"name": name, **rows[name]} for name in names]
