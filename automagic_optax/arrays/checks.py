"""Rejects bad arguments with errors that name what is wrong."""

from __future__ import annotations

from typing import Any

import jax
from optax._src.base import NO_PARAMS_MSG  # optax has no public name for it

from automagic_optax.arrays.leaves import leaf_name, leaves_of

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtypes(params: Any) -> None:
    """Raises a ValueError that names the first parameter whose dtype is not one of `DTYPES`."""
    for path, leaf, _ in leaves_of(params):
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)
        if str(dtype) not in DTYPES:
            raise ValueError(
                f"{leaf_name(path)} has dtype {dtype}; this optimizer updates {', '.join(DTYPES)} arrays. "
                "Leave other leaves out with optax.masked or optax.partition."
            )


def check_params(params: Any) -> None:
    """Raises optax's own error if an update was called without the parameters."""
    if params is None:
        raise ValueError(NO_PARAMS_MSG)
