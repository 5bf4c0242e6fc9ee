"""States that are kept in the host's memory and come to the parameter's device for its step (`state_device="cpu"`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def checked_state_device(state_device: Any) -> torch.device | None:
    """The device on which states are kept, None for that of their parameter.

    Raises:
        ValueError: neither None nor the host.
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
    """Tensors of the host on the device of their parameter; copies from pinned memory are not waited for."""
    return [x if x.device == device else x.to(device, non_blocking=True) for x in tensors]


def on_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where x comes from CUDA: then it holds its values after `wait_for_copies`."""
    if x.device.type == "cpu":
        return x
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return kept.copy_(x, non_blocking=x.is_cuda)


def wait_for_copies(devices: Iterable[torch.device]) -> None:
    """Waits until what `on_host` began is done: whoever reads a state next may be the host."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
