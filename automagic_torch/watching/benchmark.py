"""`benchmark_optimizer`: times steps of an optimizer on a model without changing either."""

from __future__ import annotations

import copy
import statistics
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from automagic_core.arrays.group_keys import group_key
from automagic_torch.steps.held_stacks import HeldStacks

_VERBOSE = group_key("verbose")
WARM_UP_STEPS = 3
"""Steps before the timed ones, which make states, load kernels and fill the allocator's cache."""


def benchmark_optimizer(model: torch.nn.Module, optimizer: Optimizer, num_steps: int = 10) -> dict[str, Any]:
    """Times steps of an optimizer on synthetic gradients.

    The steps use copies of the parameters and states, so nothing changes, even if a step fails.  Hooks of the optimizer
    do not run, and random generators stay as they are.  Where gradients are released the ordinary step is timed.

    Args:
        model: its parameters that the optimizer holds and that need gradients take part.
        optimizer: an `AutomagicCameAMP8bit`, or another torch optimizer to compare with.
        num_steps: number of timed steps, at least 1; three others come before them.  Each step waits for the device.

    Returns:
        ``"mean_ms"``, ``"median_ms"``, ``"min_ms"`` per step; ``"num_steps"``; ``"parameters"``, the number of updated
        elements; ``"state_bytes"`` of the optimizer after the steps; ``"peak_memory_bytes"``, the most memory that
        torch had allocated on one CUDA device during the steps, without the originals, or None without CUDA (it resets
        torch's statistic of the peak).

    Raises:
        ValueError: `num_steps` below 1, or no parameter in common.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps!r} is not valid; valid: an integer ≥ 1")
    of_model = {id(p) for p in model.parameters()}
    held = list(dict.fromkeys(p for group in optimizer.param_groups for p in group["params"]))
    chosen = [p for p in held if id(p) in of_model and p.requires_grad and not is_lazy(p)]
    if not chosen:
        raise ValueError("the optimizer holds no parameter of the model that needs a gradient")
    devices = sorted({p.device for p in chosen if p.is_cuda}, key=str)

    before = {device: torch.cuda.memory_allocated(device) for device in devices}
    with _on_copies(optimizer, chosen) as stand_ins:
        aside = {device: torch.cuda.memory_allocated(device) - before[device] for device in devices}
        for index, (p, original) in enumerate(zip(stand_ins, chosen, strict=True)):
            p.grad = _gradient(p, index)
            if p.is_cuda and original.grad is not None:
                aside[p.device] += original.grad.nbytes
        for _ in range(WARM_UP_STEPS):
            optimizer.step()
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        milliseconds = [_timed(optimizer, devices) for _ in range(num_steps)]
        peaks = [torch.cuda.max_memory_allocated(device) - aside[device] for device in devices]
        state_bytes = _state_bytes(optimizer)
    return {
        "mean_ms": statistics.fmean(milliseconds),
        "median_ms": statistics.median(milliseconds),
        "min_ms": min(milliseconds),
        "num_steps": num_steps,
        "parameters": sum(p.numel() for p in chosen),
        "state_bytes": state_bytes,
        "peak_memory_bytes": max(peaks, default=None),
    }


@contextmanager
def _on_copies(optimizer: Optimizer, chosen: list[Tensor]) -> Iterator[list[Tensor]]:
    """A context in which the optimizer holds copies of the chosen parameters, which it yields, and nothing else.

    The originals are not touched, since a later backward pass may need them unchanged.
    """
    aside, state, groups = dict(optimizer.__dict__), optimizer.state, optimizer.param_groups
    stand_ins = {p: _stand_in(p) for p in chosen}
    try:
        optimizer.state = defaultdict(dict, {q: _copy(state[p]) for p, q in stand_ins.items() if p in state})
        optimizer.param_groups = [_copy_group(group, stand_ins) for group in groups]
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(optimizer, hooks, OrderedDict())
        # What an optimizer knows of its arrays by itself is that of the originals.
        for name, fresh in (("_owned", dict), ("_stacks", HeldStacks), ("_gradients_agreed", dict)):
            if hasattr(optimizer, name):
                setattr(optimizer, name, fresh())
        # The gradients to step with are there already, so nothing is released.
        for name in ("_gradient_release", "_open_step"):
            if hasattr(optimizer, name):
                setattr(optimizer, name, None)
        yield list(stand_ins.values())
    finally:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(aside)
        # A wrapper of an optimizer may keep these two elsewhere.
        optimizer.state, optimizer.param_groups = state, groups


def _stand_in(p: Tensor) -> Tensor:
    copied = torch.nn.Parameter(p.detach().clone())
    copied.__dict__.update(p.__dict__)  # marks
    return copied


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return copy.deepcopy(value)


def _copy_group(group: dict[str, Any], stand_ins: dict[Tensor, Tensor]) -> dict[str, Any]:
    copied = {name: _copy(value) for name, value in group.items() if name not in ("params", "param_names")}
    copied["params"] = [stand_ins[p] for p in group["params"] if p in stand_ins]
    if _VERBOSE in copied:
        copied[_VERBOSE] = False  # a benchmark logs nothing
    return copied


def _gradient(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(p.device).manual_seed(seed)
    return torch.empty_like(p, requires_grad=False).normal_(std=1e-2, generator=generator)


def _timed(optimizer: Optimizer, devices: list[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    optimizer.step()
    for device in devices:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _state_bytes(optimizer: Optimizer) -> int:
    if hasattr(optimizer, "get_memory_efficiency_report"):
        return int(optimizer.get_memory_efficiency_report()["state_bytes"])
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
