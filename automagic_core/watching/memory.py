"""Counts the bytes that optimizer states hold, for both memory reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

ADAM_BYTES_PER_PARAMETER = 8
"""Two float32 moments."""


class ArrayMemory(NamedTuple):
    """The memory of one array's states."""

    parameters: int
    quantized: bool
    state_bytes: int


def memory_report(arrays: Iterable[ArrayMemory], shared_bytes: int = 0) -> dict[str, Any]:
    """Sums up the states of all arrays.

    Args:
        arrays: one entry per array.
        shared_bytes: bytes of the states that groups hold for all their arrays.

    Returns:
        ``total_parameters``, ``8bit_parameters``, ``32bit_parameters``: numbers of elements;
        ``state_bytes``, ``adam_state_bytes``: bytes held, and what Adam's two float32 moments would hold;
        ``state_bytes_per_parameter``; ``memory_saved_mb`` (10⁶ bytes, against Adam);
        ``compression_ratio``: 8-bit parameters over all parameters.
    """
    arrays = list(arrays)
    total = sum(array.parameters for array in arrays)
    eight = sum(array.parameters for array in arrays if array.quantized)
    state_bytes = sum(array.state_bytes for array in arrays) + shared_bytes
    adam_bytes = ADAM_BYTES_PER_PARAMETER * total
    return {
        "total_parameters": total,
        "8bit_parameters": eight,
        "32bit_parameters": total - eight,
        "memory_saved_mb": (adam_bytes - state_bytes) / 1e6,
        "compression_ratio": eight / total if total else 0.0,
        "state_bytes": state_bytes,
        "adam_state_bytes": adam_bytes,
        "state_bytes_per_parameter": state_bytes / total if total else 0.0,
    }
