"""Lets ``flax.serialization`` save and restore 8-bit states, where flax is installed.

flax knows named tuples but not `QuantizedArray`.  Codebook and block size come from the target of the restoration, as
shapes and dtypes do.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.moments.quantized_moment import QuantizedMoment


def register() -> None:
    """Makes `QuantizedArray` known to flax; does nothing without flax."""
    try:
        from flax import serialization
    except ImportError:
        return

    def to_state_dict(array: QuantizedArray) -> dict[str, Any]:
        return {"codes": array.codes, "absmax": array.absmax}

    def from_state_dict(target: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
        return dataclasses.replace(target, codes=state["codes"], absmax=state["absmax"])

    for kind in (QuantizedArray, QuantizedMoment):
        serialization.register_serialization_state(kind, to_state_dict, from_state_dict, override=True)
