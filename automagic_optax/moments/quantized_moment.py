"""A state of another transformation in 8 bits: section 3's codes, and what gives the state back as it was."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax.codec import quantized_array as codec
from automagic_optax.codec.stored import Writer, read_nonnegative, read_signed
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import devices_of, has_explicit_axes
from automagic_optax.sharding.state_shardings import absmax_sharding

LARGEST = np.float32(2.0**126)
"""The reciprocal of a scale above this is no normal float32 number."""
_UNCHANGED, _CHANGED, _UNUSABLE = np.float32(0), np.float32(1), np.float32(2)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["signed", "block_size", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedMoment(codec.QuantizedArray):
    """A state that `quantize_state` keeps in 8 bits: a `QuantizedArray` of it where it is signed, else of its root.

    Attributes:
        codes, absmax, signed, block_size: as in `QuantizedArray`.  A block that held a value that is not finite has NaN
            for its scale and reads as NaN.
        dtype: name of the state's dtype, float32, bfloat16 or float16 (static).
    """

    dtype: str = "float32"

    def read(self) -> jax.Array:
        """The state's values, in its shape and dtype; squared where the root is stored."""
        values: Any = read_signed(self) if self.signed else read_nonnegative(self)
        return values.astype(self.dtype)


@functools.partial(jax.jit, static_argnames=("signed", "block_size"))
def first_moment(value: jax.Array, signed: bool, block_size: int) -> QuantizedMoment:
    """Stores a state for the first time, rounded to nearest."""
    # Where the whole `init` is compiled the value is a constant, which the compiler would fold for minutes.
    value = jax.lax.optimization_barrier(value)
    zeros = codec.zeros(value.shape, signed, block_size)
    empty = QuantizedMoment(zeros.codes, zeros.absmax, signed, block_size, str(value.dtype))
    return write_moment(value, empty, None, Writer(jnp.zeros([], jnp.int32), stochastic=False), 0)


def write_moment(
    value: jax.Array, old: QuantizedMoment, old_value: jax.Array | None, writer: Writer, slot: int
) -> QuantizedMoment:
    """Stores a state's new values.

    A block without a change keeps its codes.  Rounding it again would change it: in the signed map a block's largest
    element reads as −0.993 of itself where it is negative, and would shrink with every step that only passes it on.

    Args:
        value: floating, in the state's shape; not negative where `old` is of the unsigned map.
        old: what was stored before.
        old_value: what that read as; None stores every block.
        writer: step and rounding.
        slot: which random bits it draws.

    Returns:
        The stored state.  A block with a value that cannot be stored (not finite, above 2¹²⁶ in magnitude, or negative
        with the unsigned map) reads as NaN as a whole: 8 bits have no code for such a value, and one number of the
        block must not turn into another silently.
    """
    if has_explicit_axes(value):
        split: Any = jax.typeof(value).sharding
        scales: Any = absmax_sharding(split, value.shape, old.block_size)
        types = dataclasses.replace(old, codes=split, absmax=scales)
        return untyped(functools.partial(write_moment, slot=slot), types)(value, old, old_value, writer)
    wide = value.astype(jnp.float32)
    root = wide if old.signed else jnp.sqrt(wide)
    usable = jnp.abs(root) <= LARGEST
    # What cannot be stored must not reach the scale: a maximum may pass over a NaN.
    safe = jnp.where(usable, wide, np.float32(0))
    new: Any = writer.signed(safe, old, slot) if old.signed else writer.nonnegative(safe, old, slot)
    changed = _CHANGED if old_value is None else jnp.where(value != old_value, _CHANGED, _UNCHANGED)
    fate = codec.block_absmax(jnp.where(usable, changed, _UNUSABLE), old.block_size)
    absmax = jnp.where(fate == _UNUSABLE, np.float32(np.nan), new.absmax)
    if old_value is None:
        return dataclasses.replace(old, codes=new.codes, absmax=absmax)
    stays = codec.per_element(fate, value.shape, old.block_size, devices_of(value)) == _UNCHANGED
    return dataclasses.replace(
        old,
        codes=jnp.where(stays, old.codes, new.codes),
        absmax=jnp.where(fate == _UNCHANGED, old.absmax, absmax),
    )
