"""Building the method of a variant, and reading off it what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.cameamp import equations
from benchmarks.evidence.rivals import RECIPES, Method
from benchmarks.evidence.settings import MAX_LR, WARM_UP_SHARE, WEIGHT_DECAY
from benchmarks.evidence.variants import Variant


class Ours(Method):
    """This optimizer: the ramp is its own, the schedule a cosine.

    Args:
        swaps: names of `SWAPS` that take the place of formulas.
    """

    def __init__(self, optimizer: AutomagicCameAMP8bit, steps: int, start: float, swaps: tuple[str, ...]) -> None:
        super().__init__(optimizer, steps, rate=start)
        self.start, self.swaps = start, swaps

    def step(self) -> None:
        """A step with the swapped formulas."""
        with swapped(self.swaps):
            self.optimizer.step()

    def found_rate(self) -> float | None:
        """lr · exp ℓ."""
        group = self.optimizer.param_groups[0]
        searches = group["automagic_search_gain"] > 0
        return self.start * float(group["automagic_log_rate_scale"].exp()) if searches else None


def build(variant: Variant, parameters: list[Parameter], start: float, steps: int) -> Method:
    """The variant's method.

    Args:
        start: a rate, or the number that a method without a rate begins with.
        steps: of the whole run; decide how long the search for the rate goes on.
    """
    if variant.optimizer == "ours":
        optimizer = AutomagicCameAMP8bit(parameters, **fields_of_ours(variant, start, steps))
        return Ours(optimizer, steps, start, variant.swaps)
    if variant.optimizer not in RECIPES:
        raise ValueError(f"optimizer = {variant.optimizer!r} is not known; valid: ours, {', '.join(RECIPES)}")
    return RECIPES[variant.optimizer](parameters, start, steps)


def fields_of_ours(variant: Variant, start: float, steps: int) -> dict[str, Any]:
    """Everything that this optimizer is given, in PyTorch and in JAX."""
    # A quarter of the warm-up is the ramp, as long as that of the others; without a search the rest changes nothing.
    warm_up = round(WARM_UP_SHARE * steps)
    common = {"lr": start, "max_lr": MAX_LR, "weight_decay": WEIGHT_DECAY, "warmup_steps": warm_up, "force_8bit": True}
    return {**common, **variant.fields}


def memory(method: Method) -> dict[str, Any]:
    """What the states hold now.

    Returns:
        `state_bytes`; `adam_bytes`, 8 per parameter; `share_8bit`, the part of the parameters with 8-bit moments.
    """
    optimizer = method.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = sum(p.numel() for p in parameters)
    if isinstance(optimizer, AutomagicCameAMP8bit):
        report = optimizer.get_memory_efficiency_report()
        held, eight = report["state_bytes"], report["8bit_parameters"]
    else:
        # bitsandbytes' tables of codes are the same few tensors for all parameters.
        distinct = {tensor.data_ptr(): tensor for tensor in method.tensors() if tensor.numel()}
        held = sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
        first = {p: optimizer.state[p].get("state1") for p in parameters}
        eight = sum(p.numel() for p, state in first.items() if state is not None and state.dtype == torch.uint8)
    return {"state_bytes": held, "adam_bytes": 8 * total, "share_8bit": eight / total}


def _hard_mask(d: Tensor, u: Tensor, old: Mapping[str, Tensor], gamma: float, means: Any) -> Any:
    """Cautious' mask [m · g > 0] · n / (ones + 1) where the torque would be."""
    mask = (d * u > 0).to(d.dtype)
    share = means.arrays(mask)
    n = d[0].numel()
    states = {name: old[name] for name in ("s", "torque_mean") if name in old}
    return mask.mul_(d).div_(share.add(1 / n)), states


def _certain(u: Tensor, m_hat: Tensor, *rest: Any) -> Any:
    """r̂ = 1 whatever the gradients do."""
    return torch.ones_like(m_hat), {}


SWAPS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "hard-mask": ("torque", _hard_mask),
    "no-confidence": ("confidence", _certain),
}
"""What the package has no switch for, as a formula of `equations` and what stands in for it."""


@contextmanager
def swapped(names: tuple[str, ...]) -> Iterator[None]:
    """Within it the named formulas of the package are others."""
    before = {SWAPS[name][0]: getattr(equations, SWAPS[name][0]) for name in names}
    for name in names:
        setattr(equations, *SWAPS[name])
    try:
        yield
    finally:
        for formula, function in before.items():
            setattr(equations, formula, function)
