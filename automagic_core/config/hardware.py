"""A configuration from what the device is: a pure function of its memory and its compute capability.

1 GB is 10⁹ bytes.  A card sold with N GB has N · 2³⁰ bytes and reports up to 6 % less, so that counted in 2³⁰ bytes
every "8 GB" card would be one of less than 8 GB; counted in 10⁹ bytes it is what its name says.
"""

from __future__ import annotations

from typing import Any

from automagic_core.config.config import Config

GB = 10**9
FIRST_WITH_TENSOR_CORES = (7, 0)


def adaptive_config(
    memory_bytes: int | None, compute_capability: tuple[int, int] | None = None, **fields: Any
) -> Config:
    """A profile by memory alone.

    | memory | profile |
    |---|---|
    | no accelerator | `memory_optimized` in 32 bits: ``optim_bits=32``, ``force_8bit=False`` |
    | below 8 GB, or unknown | `memory_optimized` |
    | below 16 GB | `balanced` |
    | from 16 GB | `quality_optimized` |

    Args:
        memory_bytes: the accelerator's whole memory; None where there is none or where it does not tell.
        compute_capability: (major, minor); None where the device has none.  It only tells an accelerator of unknown
            memory from none at all.
        **fields: of `Config`; they win over what is decided here.

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
    """A profile and the least size of an 8-bit array, by memory and compute capability.

    | device | profile | `min_8bit_size` |
    |---|---|---|
    | no accelerator | `memory_optimized` in 32 bits: ``optim_bits=32``, ``force_8bit=False`` | 2048 |
    | below 6 GB, or unknown memory, or a compute capability below 7.0 | `memory_optimized` | 2048 |
    | below 12 GB | `balanced` | 4096 |
    | from 12 GB | `quality_optimized` | 8192 |

    Without an accelerator 8 bits cost time and save memory that is rarely short there, so states keep 32 bits; what is
    decided then is the same as in `adaptive_config`.

    Args:
        memory_bytes, compute_capability: as in `adaptive_config`; a device that has no compute capability (a TPU, say)
            is judged by its memory.
        **fields: of `Config`; they win over what is decided here.

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
