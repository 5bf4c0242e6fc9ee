"""Keeps states in the host's memory (`state_device="cpu"`; docs/algorithm.md, section 9.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_state_device(state_device: Any) -> torch.device | None:
    """The device of the states; None for that of their parameter.

    Raises:
        ValueError: it is neither None nor the host.
    """
    if state_device is None:
        return None
    try:
        device = torch.device(state_device)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type != "cpu":
        raise ValueError(f"state_device = {state_device!r} is not valid; valid: None (with the parameter), 'cpu'")
    return device


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies tensors to a device.  The host does not wait for copies from pinned memory."""
    return [x if x.device == device else x.to(device, non_blocking=True) for x in tensors]


def on_host(x: Tensor) -> Tensor:
    """Copies x to the host's memory.  From CUDA the copy is pinned and complete only after `wait_for_copies`."""
    if x.device.type == "cpu":
        return x
    kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return kept.copy_(x, non_blocking=x.is_cuda)


def wait_for_copies(devices: Iterable[torch.device]) -> None:
    """Waits until the copies of `on_host` are complete, since the host may read them next."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
