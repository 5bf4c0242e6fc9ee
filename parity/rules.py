"""Which rule the JAX codec rounds by, so that it stands beside bitsandbytes as it really is on a device."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import dynamic_codebook
from automagic_optax.codec.quantized_array import RoundingRule, exact_rule
from parity.cpu_rule import cpu_code_borders


@cache
def _borders(signed: bool) -> np.ndarray:
    return cpu_code_borders(dynamic_codebook(signed))


def cpu_nearest_code(y: jax.Array, signed: bool) -> jax.Array:
    """The code that bitsandbytes' CPU kernel gives y: its grid of 65,536 points as borders between codes.

    Args:
        y: float32 in [−1, 1].
        signed: which codebook.
    """
    return jnp.searchsorted(jnp.asarray(_borders(signed)), y, side="right").astype(jnp.int32)


def cpu_rule(y: jax.Array, signed: bool, random: jax.Array | None) -> jax.Array:
    """The nearest code on the grid, moved to a neighbour as section 3 says where `random` is given."""
    codes = cpu_nearest_code(y, signed)
    if random is None:
        return codes
    values = jnp.asarray(dynamic_codebook(signed))
    error = y - values[codes]
    neighbour = jnp.clip(codes + jnp.sign(error).astype(jnp.int32), 0, 255)
    gap = jnp.abs(values[neighbour] - values[codes])
    # At either end of the map the neighbour is the code itself: gap 0, and the quotient's value does not matter.
    return jnp.where(random < jnp.minimum(np.float32(1), jnp.abs(error) / gap), neighbour, codes)


def rounding_rule(device: str, block_wise: bool = True) -> RoundingRule:
    """The rule that the torch side rounds by.

    Args:
        device: bitsandbytes rounds through its grid on a CPU, exactly on CUDA.
        block_wise: without blocks the torch side uses a codec of its own, which is exact everywhere.
    """
    return cpu_rule if device == "cpu" and block_wise else exact_rule
