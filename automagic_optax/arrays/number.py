"""Fields in float32."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from automagic_core.config.ranges import is_checkable


def number(x: Any) -> Any:
    """A field in float32: a constant of the program, or a scalar where its value is not known yet."""
    return np.float32(x) if is_checkable(x) else jnp.asarray(x, jnp.float32)
