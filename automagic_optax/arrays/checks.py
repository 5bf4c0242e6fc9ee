"""Rejects bad arguments with errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from optax._src.base import NO_PARAMS_MSG  # optax has no public name for it

from automagic_optax.arrays.containers import flatten_like
from automagic_optax.arrays.leaves import leaf_name, leaves_of

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtypes(params: Any) -> None:
    """Raises a ValueError that names the first parameter whose dtype is not one of `DTYPES`."""
    for path, leaf, _ in leaves_of(params):
        dtype = dtype_of(leaf) if hasattr(leaf, "dtype") else type(leaf)
        if str(dtype) not in DTYPES:
            raise ValueError(
                f"{leaf_name(path)} has dtype {dtype}; only {', '.join(DTYPES)} arrays are updated here. "
                "Leave other leaves out with optax.masked or optax.partition."
            )


def dtype_of(x: Any) -> Any:
    """The dtype that an array has in JAX: without x64, numpy's float64 is float32."""
    return jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)  # keys of random numbers are extended


def check_shapes(params: Any, states: Sequence[Any], what: str, *, statistics: bool = False) -> None:
    """Raises a ValueError that names the first parameter whose shape is not that of its state.

    Args:
        params: tree of arrays.
        states: for each of its leaves an array, or None.
        what: name of the states.
        statistics: they may have length 1 along any axis.
    """
    for leaf, state in zip(leaves_of(params), states, strict=True):
        shape = leaf.shape if state is None else tuple(state.shape)
        lengths = [1 if statistics and n == 1 else m for n, m in zip(shape, leaf.shape, strict=False)]
        if len(shape) != len(leaf.shape) or list(shape) != lengths:
            raise ValueError(
                f"{leaf_name(leaf.path)} has shape {leaf.shape}, but its {what} in the state has shape {shape}; "
                "after a change of shapes, make a new state with tx.init(params)"
            )


def check_gradients(params: Any, gradients: Any) -> None:
    """Raises a ValueError that names the first parameter whose shape is not that of its gradient."""
    for leaf, g in zip(leaves_of(params), flatten_like(params, gradients), strict=True):
        if hasattr(g, "shape") and tuple(g.shape) != leaf.shape:
            raise ValueError(
                f"{leaf_name(leaf.path)} has shape {leaf.shape}, but its gradient has shape {tuple(g.shape)}; "
                "give update the gradients of these parameters"
            )


def check_params(params: Any) -> None:
    """Raises optax's own error if an update was called without the parameters."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
