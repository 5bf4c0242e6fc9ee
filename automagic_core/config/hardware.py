"""Chooses a configuration for a device from its memory and compute capability.

1 GB is 10⁹ bytes.  A card sold with 8 GB has 8 · 2³⁰ bytes and reports up to 6 % less, which is still above 8 · 10⁹.
"""

from __future__ import annotations

from typing import Any

from automagic_core.config.config import Config

GB = 10**9
FIRST_WITH_TENSOR_CORES = (7, 0)


def adaptive_config(
    memory_bytes: int | None, compute_capability: tuple[int, int] | None = None, **fields: Any
) -> Config:
    """Chooses a profile by memory alone.

    | memory | profile |
    |---|---|
    | no accelerator | `memory_optimized` in 32 bits: ``optim_bits=32``, ``force_8bit=False`` |
    | below 8 GB, or unknown | `memory_optimized` |
    | below 16 GB | `balanced` |
    | from 16 GB | `quality_optimized` |

    Args:
        memory_bytes: all memory of the accelerator; None without an accelerator, or where its memory is unknown.
        compute_capability: (major, minor), or None.  Here it only distinguishes an accelerator of unknown memory from
            no accelerator.
        **fields: fields of `Config`; they win over the profile.

    Raises:
        ValueError: as in `Config`.
    """
    if memory_bytes is None and compute_capability is None:
        return Config(**_no_accelerator() | fields)
    if memory_bytes is None or memory_bytes < 8 * GB:
        profile = "memory_optimized"
    else:
        profile = "balanced" if memory_bytes < 16 * GB else "quality_optimized"
    return Config(**{"profile": profile} | fields)


def hardware_optimized_config(
    memory_bytes: int | None, compute_capability: tuple[int, int] | None = None, **fields: Any
) -> Config:
    """Chooses a profile and `min_8bit_size` by memory and compute capability.

    | device | profile | `min_8bit_size` |
    |---|---|---|
    | no accelerator | `memory_optimized` in 32 bits: ``optim_bits=32``, ``force_8bit=False`` | 2048 |
    | below 6 GB, or unknown memory, or a compute capability below 7.0 | `memory_optimized` | 2048 |
    | below 12 GB | `balanced` | 4096 |
    | from 12 GB | `quality_optimized` | 8192 |

    Without an accelerator states keep 32 bits: 8 bits cost time there, and memory is rarely short.

    Args:
        memory_bytes, compute_capability, **fields: as in `adaptive_config`.  A device without a compute capability,
            such as a TPU, is judged by its memory.

    Raises:
        ValueError: as in `Config`.
    """
    if memory_bytes is None and compute_capability is None:
        return Config(**_no_accelerator() | {"min_8bit_size": 2048} | fields)
    old = compute_capability is not None and compute_capability < FIRST_WITH_TENSOR_CORES
    if memory_bytes is None or memory_bytes < 6 * GB or old:
        decided = {"profile": "memory_optimized", "min_8bit_size": 2048}
    elif memory_bytes < 12 * GB:
        decided = {"profile": "balanced", "min_8bit_size": 4096}
    else:
        decided = {"profile": "quality_optimized", "min_8bit_size": 8192}
    return Config(**decided | fields)


def _no_accelerator() -> dict[str, Any]:
    return {"profile": "memory_optimized", "optim_bits": 32, "force_8bit": False}
