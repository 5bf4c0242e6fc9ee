"""Chooses a configuration for a CUDA device from what torch knows about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from automagic_core import Config
from automagic_core.config.hardware import adaptive_config, hardware_optimized_config

Device = torch.device | str | int | None


def get_adaptive_config(device: Device = None, **fields: Any) -> Config:
    """Chooses a configuration by the memory of a CUDA device: `automagic_core.adaptive_config`.

    Args:
        device: by default the current CUDA device.  Any other device, or none, counts as no GPU.
        **fields: fields of `Config`, such as `lr`; they win over the profile.

    Returns:
        A `Config`: `memory_optimized` below 8 GB (10⁹ bytes), `balanced` below 16 GB, else `quality_optimized`; without
        a GPU `memory_optimized` in 32 bits.

    Example:
        >>> config = get_adaptive_config(lr=1e-4)
        >>> optimizer = AutomagicCameAMP8bit(model.parameters(), **config.__dict__)
    """
    return adaptive_config(*cuda_facts(device), **fields)


def get_hardware_optimized_config(device: Device = None, **fields: Any) -> Config:
    """Chooses a configuration by memory and compute capability: `automagic_core.hardware_optimized_config`.

    Args:
        device, **fields: as in `get_adaptive_config`.

    Returns:
        A `Config`: `memory_optimized` with `min_8bit_size` 2048 below 6 GB (10⁹ bytes) or below compute capability 7.0,
        `balanced` with 4096 below 12 GB, else `quality_optimized` with 8192; without a GPU `memory_optimized` in 32
        bits.
    """
    return hardware_optimized_config(*cuda_facts(device), **fields)


def cuda_facts(device: Device = None) -> tuple[int | None, tuple[int, int] | None]:
    """Memory in bytes and compute capability (major, minor) of a CUDA device; (None, None) for other devices."""
    if not torch.cuda.is_available():
        return None, None
    if device is not None and not isinstance(device, int) and torch.device(device).type != "cuda":
        return None, None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    return int(properties.total_memory), (int(properties.major), int(properties.minor))


def cuda_memory_use(devices: Iterable[torch.device]) -> float | None:
    """The part of the fullest CUDA device's memory that torch has reserved; None if no device is CUDA."""
    used = [
        torch.cuda.memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
        for device in devices
        if device.type == "cuda"
    ]
    return max(used, default=None)
