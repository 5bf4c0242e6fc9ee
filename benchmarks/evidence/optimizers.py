"""Building the optimizer of a variant, and reading off it what it found and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.evidence.cautious import CautiousAdamW
from benchmarks.evidence.jobs.job import cosine
from benchmarks.evidence.variants import MAX_LR, RAMP_SHARE, WARM_UP_SHARE, WEIGHT_DECAY, Variant

BASELINES = ("adamw", "cautious-adamw", "adamw8bit", "came")


def build(variant: Variant, parameters: list[Parameter], lr: float, steps: int) -> Optimizer:
    """The variant's optimizer.

    Args:
        lr: this optimizer's starting rate, or the peak of the others' schedule.
        steps: of the whole run; decide how long the search for the rate goes on.
    """
    if variant.optimizer == "ours":
        searches = variant.fields.get("search_gain", 1.0) > 0
        ramp = round((WARM_UP_SHARE if searches else RAMP_SHARE) * steps)
        common = {"max_lr": MAX_LR, "weight_decay": WEIGHT_DECAY, "warmup_steps": ramp, "force_8bit": True}
        return AutomagicCameAMP8bit(parameters, lr=lr, **{**common, **variant.fields})
    if variant.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    if variant.optimizer == "cautious-adamw":
        return CautiousAdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    if variant.optimizer == "adamw8bit":
        return bnb.optim.AdamW8bit(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    if variant.optimizer == "came":
        from came_pytorch import CAME

        return CAME(parameters, lr=lr, weight_decay=WEIGHT_DECAY)
    raise ValueError(f"optimizer = {variant.optimizer!r} is not known; valid: ours, {', '.join(BASELINES)}")


def schedule(optimizer: Optimizer, lr: float, steps: int) -> Callable[[int], None]:
    """A function that sets the rate of a 0-based step: a cosine to 0 for all, behind a ramp where none is built in."""
    ramp = 0 if isinstance(optimizer, AutomagicCameAMP8bit) else round(RAMP_SHARE * steps)

    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(step, steps, ramp)

    return set_rate


def found_rate(optimizer: Optimizer, lr: float) -> float | None:
    """The rate that the search ended with before the schedule, lr · exp ℓ; None where nothing searches."""
    if isinstance(optimizer, AutomagicCameAMP8bit) and optimizer.param_groups[0]["automagic_search_gain"] > 0:
        return lr * float(optimizer.param_groups[0]["automagic_log_rate_scale"].exp())
    return None


def memory(optimizer: Optimizer) -> dict[str, Any]:
    """What the states hold now.

    Returns:
        `state_bytes`; `adam_bytes`, 8 per parameter; `share_8bit`, the part of the parameters with 8-bit states.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = sum(p.numel() for p in parameters)
    if isinstance(optimizer, AutomagicCameAMP8bit):
        report = optimizer.get_memory_efficiency_report()
        held, eight = report["state_bytes"], report["8bit_parameters"]
    else:
        states = {p: list(_tensors(optimizer.state[p])) for p in parameters}
        # bitsandbytes' tables of codes are the same few tensors for all parameters.
        distinct = {tensor.data_ptr(): tensor for tensors in states.values() for tensor in tensors}
        held = sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
        eight = sum(p.numel() for p, tensors in states.items() if any(t.dtype == torch.uint8 for t in tensors))
    return {"state_bytes": held, "adam_bytes": 8 * total, "share_8bit": eight / total}


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    return (value for value in state.values() if isinstance(value, Tensor) and value.numel())
