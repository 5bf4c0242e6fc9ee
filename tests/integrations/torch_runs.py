"""The optimizer and a small model that the tests of PyTorch libraries share."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from automagic_torch import AutomagicCameAMP8bit

FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 1e-1, "warmup_steps": 4, "min_8bit_size": 64, "force_8bit": True}
"""8-bit states for every matrix; the warm-up ends within the runs."""


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 16))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> None:
    """Leaves the gradients of one step."""
    model.zero_grad()
    x = batch(step)
    (model(x) - x.flip(-1)).square().mean().backward()


def optimizer_for(params: Any, **fields: Any) -> AutomagicCameAMP8bit:
    with warnings.catch_warnings(action="ignore"):
        return AutomagicCameAMP8bit(params, **FIELDS | fields)
