"""One array's states under PyTorch's flat names, and their check.

In PyTorch an 8-bit state is two tensors, ``exp_avg`` and ``exp_avg_absmax``, and a factored one ``exp_avg_sq_row`` and
``exp_avg_sq_col``, so that every tool that moves state dicts can handle each by itself.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from automagic_core import StatePlan
from automagic_optax.cameamp_state import ArrayState
from automagic_optax.codec import QuantizedArray
from automagic_optax.stored import RowColumn

Fields = dict[str, np.ndarray]

_SIGNED = {"exp_avg": True, "exp_avg_sq": False, "exp_avg_res": False, "s": True}


def flat_fields(array: ArrayState) -> dict[str, Any]:
    """Every stored array by its PyTorch name."""
    fields: dict[str, Any] = {}
    for name, value in array._asdict().items():
        if isinstance(value, QuantizedArray):
            fields |= {name: value.codes, f"{name}_absmax": value.absmax}
        elif isinstance(value, RowColumn):
            fields |= {f"{name}_row": value.row, f"{name}_col": value.column}
        elif value is not None:
            fields[name] = value
    return fields


def unflat_fields(stored: Fields, plan: StatePlan, warming: bool, parameter: str) -> ArrayState:
    """The states of one array from its PyTorch tensors.

    Args:
        stored: by PyTorch name.
        plan: the array's states; 8 or 32 bits is what `stored` holds.
        warming: the states that only the warm-up needs are expected.
        parameter: its name, for errors.

    Raises:
        ValueError: a state is missing, unknown, or of another shape or dtype; the message says which and how.
    """
    left = dict(stored)
    quantized = "exp_avg_absmax" in left

    def take(name: str, shape: tuple[int, ...], dtype: type) -> Any:
        if name not in left:
            raise ValueError(f"the state of {parameter} lacks {name}")
        value = left.pop(name)
        if (value.shape, value.dtype) != (shape, np.dtype(dtype)):
            raise ValueError(
                f"the state of {parameter} has {name} of shape {value.shape} and {value.dtype}; "
                f"expected {shape} and {np.dtype(dtype)}"
            )
        return jnp.asarray(value)

    def elementwise(name: str) -> Any:
        if not quantized:
            return take(name, plan.shape, np.float32)
        codes = take(name, plan.shape, np.uint8)
        absmax = take(f"{name}_absmax", plan.absmax_shape, np.float32)
        return QuantizedArray(codes, absmax, _SIGNED[name], plan.block_size)

    def moment(name: str, factored: bool) -> Any:
        if not factored:
            return elementwise(name)
        row = take(f"{name}_row", plan.row_shape, np.float32)
        return RowColumn(row, take(f"{name}_col", plan.column_shape, np.float32))

    array = ArrayState(
        age=take("age", (), np.int32),
        skipped_steps=take("skipped_steps", (), np.int32),
        torque_mean=take("torque_mean", (), np.float32),
        background_scale=take("background_scale", (), np.float32),
        exp_avg=elementwise("exp_avg"),
        exp_avg_sq=moment("exp_avg_sq", plan.factored_sq),
        exp_avg_res=moment("exp_avg_res", plan.factored_res),
        s=elementwise("s") if warming and plan.has_s else None,
        last_polarity=(
            take("last_polarity", plan.polarity_shape, np.uint8) if warming and plan.has_last_polarity else None
        ),
        lr_mask=take("lr_mask", plan.row_shape, np.float32) if plan.has_lr_mask else None,
        spatial_variance=(take("spatial_variance", plan.row_shape, np.float32) if plan.has_spatial_variance else None),
    )
    if left:
        raise ValueError(f"the state of {parameter} has unknown entries: {', '.join(sorted(left))}")
    return array
