"""Recognizes DTensors, which several processes hold together, without importing `torch.distributed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """Gathers a DTensor, which all its processes must do at once; other tensors are returned as they are."""
    return x.full_tensor() if is_dtensor(x) else x


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Whether x is a DTensor."""
    return hasattr(x, "device_mesh")
