"""One word for all bits of a training run, to compare runs by."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def digest(arrays: Iterable[tuple[str, Any]]) -> str:
    """Of names, dtypes, shapes and bits.

    Args:
        arrays: pairs of a name and a numpy array, or what numpy makes one of, in an order that does not change.
    """
    found = hashlib.sha256()
    for name, value in arrays:
        array = np.ascontiguousarray(value)
        found.update(f"{name} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:32]
