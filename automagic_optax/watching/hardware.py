"""Chooses a configuration for a device from its memory and compute capability."""

from __future__ import annotations

import os
from typing import Any

import jax

from automagic_core import Config
from automagic_core.config.hardware import adaptive_config, hardware_optimized_config

DEFAULT_MEMORY_FRACTION = 0.75
"""The part of a GPU's memory that JAX manages by default."""


def get_adaptive_config(device: Any = None, **fields: Any) -> Config:
    """A configuration by the device's memory: `automagic_core.adaptive_config`.

    Args:
        device: a ``jax.Device``, by default the first local one.  A CPU counts as no accelerator.
        **fields: of `Config`; they win over what is chosen.  Give `lr` here, or to `automagic_8bit`.

    Returns:
        A `Config`: `memory_optimized` below 8 GB (10⁹ bytes), `balanced` below 16 GB, else `quality_optimized`.
        Without an accelerator, or if its memory is unknown, `memory_optimized` in 32 bits.

    Example:
        >>> fields = dict(get_adaptive_config().__dict__)
        >>> tx = automagic_8bit(fields.pop("lr"), **fields)
    """
    return adaptive_config(*device_facts(device), **fields)


def get_hardware_optimized_config(device: Any = None, **fields: Any) -> Config:
    """A configuration by memory and compute capability: `automagic_core.hardware_optimized_config`.

    Args:
        device, **fields: as in `get_adaptive_config`.

    Returns:
        A `Config`: `memory_optimized` with `min_8bit_size` 2048 below 6 GB (10⁹ bytes) or below compute capability 7.0,
        `balanced` with 4096 below 12 GB, else `quality_optimized` with 8192; without an accelerator `memory_optimized`
        in 32 bits.
    """
    return hardware_optimized_config(*device_facts(device), **fields)


def device_facts(device: Any = None) -> tuple[int | None, tuple[int, int] | None]:
    """Memory in bytes and compute capability (major, minor) of a device; None for what is unknown.

    For a GPU, JAX knows only the memory that it manages, a part of the whole (``XLA_CLIENT_MEM_FRACTION``, 0.75 by
    default).  The whole is computed from it, so that a card gives the same configuration as in PyTorch.
    """
    device = jax.local_devices()[0] if device is None else device
    if device.platform == "cpu":
        return None, None
    managed = (memory_stats(device) or {}).get("bytes_limit")
    if managed is None:
        return None, _compute_capability(device)
    fraction = _memory_fraction() if device.platform in ("gpu", "cuda", "rocm") else 1.0
    return round(managed / fraction), _compute_capability(device)


def memory_stats(device: Any) -> dict[str, int] | None:
    """``device.memory_stats()``, or None where the device has none."""
    try:
        stats: dict[str, int] | None = device.memory_stats()
        return stats
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def device_memory_use() -> float | None:
    """The share of memory in use (of ``bytes_limit``) on the fullest local device; None where it is unknown."""
    stats = [found for device in jax.local_devices() if (found := memory_stats(device))]
    used = [found["bytes_in_use"] / found["bytes_limit"] for found in stats if found.get("bytes_limit")]
    return max(used, default=None)


def _memory_fraction() -> float:
    given = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(given) if given else DEFAULT_MEMORY_FRACTION


def _compute_capability(device: Any) -> tuple[int, int] | None:
    # "9.0" on CUDA.  Other GPUs name an architecture there, and other accelerators have no such attribute.
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
