"""Times of a step in torch: by CUDA events on a GPU, by the clock elsewhere."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.measuring import ROUNDS, spread, steps_in_a_round


def wait(device: str) -> None:
    """Until everything that was begun is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """One step by the clock, waited for."""
    wait(device)
    started = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - started


def timed(step: Callable[[], Any], device: str, rounds: int = ROUNDS) -> dict[str, Any]:
    """Milliseconds of a step, which has been warmed up: median and spread over rounds of several steps."""
    inner = steps_in_a_round(min(seconds_of(step, device) for _ in range(2)))
    found = [_round(step, device, inner) for _ in range(rounds)]
    return spread(found) | {"steps_in_a_round": inner}


def _round(step: Callable[[], Any], device: str, inner: int) -> float:
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(inner):
            step()
        return 1e3 * (time.perf_counter() - started) / inner
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(inner):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / inner


def allocated(device: str) -> int:
    """Bytes that torch holds on the device, after a clean-up."""
    gc.collect()
    wait(device)
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak_of(step: Callable[[], Any], device: str) -> int | None:
    """The most that a step holds beyond what was there before, in bytes; None without CUDA."""
    if device != "cuda":
        return None
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated() - before
