"""Automagic v3 as ai-toolkit describes it, written anew: one rate, moved by the signs of the last updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

WINDOW = 8
"""Signs that each element remembers: the bits of one byte."""
EQUAL, ALTERNATING = (0b00000000, 0b11111111), (0b01010101, 0b10101010)
RATE_LIMITS = (1e-30, 1e3)


class AutomagicV3(Optimizer):
    """No momentum: u = g / √v with Adafactor's factored v, bounded, times one rate that searches up and down.

    After each step the rate is multiplied by exp(Σ vote |u| / Σ |u|) over all elements of the group: an element votes
    +1 when its last eight signs are equal, −1 when they alternate and 0 otherwise, and not before the eighth step.

    Args:
        params, lr, weight_decay: as `torch.optim.AdamW` takes them; `lr` is where the search begins.
        beta2: decay of v, which is not corrected for its start: the bound on the update does that.
        clip: bound on the root mean square of u, and then on each of its elements.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        beta2: float = 0.999,
        eps: float = 1e-30,
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "clip": clip, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient, then the rate of each group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            votes = weights = 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(_fresh(p))
                u = _bounded(_update(p.grad.nan_to_num(0.0, 0.0, 0.0), state, group), group["clip"])
                state["step"] += 1
                window = state["window"] = (state["window"] << 1) | (u > 0)
                if state["step"] >= WINDOW:
                    size = u.abs()
                    votes += float((size * _vote(window)).sum())
                    weights += float(size.sum())
                p.sub_(u.add_(p, alpha=group["weight_decay"]), alpha=group["lr"])
            if weights > 0:
                rate = group["lr"] * float(torch.tensor(votes / weights, dtype=torch.float64).exp())
                group["lr"] = min(max(rate, RATE_LIMITS[0]), RATE_LIMITS[1])
        return loss


def _fresh(p: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {"step": 0, "window": torch.zeros(p.shape, dtype=torch.uint8)}
    if p.dim() < 2:
        return state | {"v": torch.zeros_like(p)}
    return state | {"row": p.new_zeros(p.shape[:-1]), "column": p.new_zeros(p.shape[:-2] + p.shape[-1:])}


def _update(g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    rest, eps = 1 - group["beta2"], group["eps"]
    square = g.square() + eps
    if g.dim() < 2:
        return g / state["v"].lerp_(square, rest).sqrt()
    row, column = state["row"].lerp_(square.mean(-1), rest), state["column"].lerp_(square.mean(-2), rest)
    return g * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)


def _bounded(u: Tensor, clip: float) -> Tensor:
    u = u / (u.square().mean().sqrt() / clip).clamp(min=1.0)
    return u.clamp_(-clip, clip)


def _vote(window: Tensor) -> Tensor:
    up, down = ((window == a) | (window == b) for a, b in (EQUAL, ALTERNATING))
    return up.float() - down.float()
