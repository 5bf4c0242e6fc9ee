"""Small models and runs that several test modules share."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from automagic_torch import AutomagicCameAMP8bit

SHAPES = ((), (5,), (8, 6), (4, 3, 5), (4, 3, 3, 3))
SMALL: dict[str, Any] = {"lr": 1e-3, "max_lr": 1e-1, "warmup_steps": 4, "min_8bit_size": 16, "force_8bit": True}
# Every state of the search, and a rate that rises within a few steps.
SMALL |= {"lr_mask_gain": 0.2, "straightness": 0.7}
FIRST = math.log(1e-5 / SMALL["lr"])
"""ℓ at the first step of a run with these fields."""
TOO_OLD_TO_COMPILE = TorchVersion(torch.__version__) < "2.9"
"""Asked here and not of the code under test, so that a compiler that is wrongly missed fails tests and skips none."""


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (0.5 + torch.randn(p.shape, generator=generator)).to(p)


def run(optimizer: AutomagicCameAMP8bit, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshot(optimizer: AutomagicCameAMP8bit) -> Any:
    """Everything that a step may change, copied."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Bit for bit, dtypes included."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*as_bytes)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
