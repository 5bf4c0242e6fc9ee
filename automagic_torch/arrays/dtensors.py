"""Knowing a DTensor, which several processes hold together, without importing what such tensors need."""

from __future__ import annotations

from torch import Tensor


def whole(x: Tensor) -> Tensor:
    """All of a tensor: a DTensor is gathered, which every process that holds it must do; others are returned."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def is_dtensor(x: Tensor) -> bool:
    """Whether processes hold it together; does not import what such tensors need."""
    return hasattr(x, "device_mesh")
