"""`QuantizedMoment`: one 8-bit state of a transformation wrapped by `quantize_state`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_optax.codec.quantized_array import QuantizedArray, block_absmax, per_element, zeros
from automagic_optax.codec.stored import Writer
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import devices_of, has_explicit_axes
from automagic_optax.sharding.state_shardings import absmax_sharding

LARGEST = np.float32(2.0**126)
"""The reciprocal of an absmax above this is no normal float32 number."""
_UNCHANGED, _CHANGED, _UNUSABLE = np.float32(0), np.float32(1), np.float32(2)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["signed", "block_size", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedMoment(QuantizedArray):
    """A state that `quantize_state` keeps in 8 bits: as it is where it is signed, else as its root.

    Attributes:
        codes, absmax, signed, block_size: as in `QuantizedArray`.  The absmax of a block with a value that cannot be
            stored is NaN, so the block reads as NaN.
        dtype: name of the state's dtype: float32, bfloat16 or float16 (static).
    """

    dtype: str = "float32"

    def read(self) -> jax.Array:
        """The state's values, in its shape and dtype; squared where the root is stored."""
        values = self.dequantize()
        return (values if self.signed else jnp.square(values)).astype(self.dtype)


@functools.partial(jax.jit, static_argnames=("signed", "block_size"))
def first_moment(value: jax.Array, signed: bool, block_size: int) -> QuantizedMoment:
    """Stores a state for the first time, rounded to nearest."""
    # In a compiled `init` the value is a constant.  The barrier saves minutes in which XLA would compute its codes.
    value = jax.lax.optimization_barrier(value)
    empty = zeros(value.shape, signed, block_size)
    empty = QuantizedMoment(empty.codes, empty.absmax, signed, block_size, str(value.dtype))
    return write_moment(value, empty, None, Writer(jnp.zeros([], jnp.int32), stochastic=False), 0)


def write_moment(
    value: jax.Array, old: QuantizedMoment, old_value: jax.Array | None, writer: Writer, slot: int | jax.Array
) -> QuantizedMoment:
    """Stores a state's new values.

    A block in which nothing changed keeps its codes.  Rounded again, its most negative element would shrink with each
    step, since the signed codebook ends at −0.993.  A value of an unsigned state that is not 0 has at least code 1, the
    zero-point problem of 8-bit second moments (Li et al., arXiv 2309.01507).

    Args:
        value: floating, in the state's shape; not negative where `old` is unsigned.
        old: the state as stored before.
        old_value: its values; None stores every block.
        writer: gives step and rounding.
        slot: selects the random bits.

    Returns:
        The stored state.  A block with a value that cannot be stored (not finite, above 2¹²⁶ in magnitude, or negative
        where `old` is unsigned) reads as NaN as a whole: such a value must not turn into a number silently.
    """
    if has_explicit_axes(value):
        split: Any = jax.typeof(value).sharding
        absmax_split: Any = absmax_sharding(split, value.shape, old.block_size)
        types = dataclasses.replace(old, codes=split, absmax=absmax_split)
        write = untyped(functools.partial(write_moment, slot=slot), types)
        stored: QuantizedMoment = write(value, old, old_value, writer)
        return stored
    wide = value.astype(jnp.float32)
    root = wide if old.signed else jnp.sqrt(wide)
    usable = jnp.abs(root) <= LARGEST
    # What cannot be stored must not reach the absmax, since a maximum may pass over a NaN.
    safe = jnp.where(usable, wide, np.float32(0))
    new: Any = writer.signed(safe, old, slot) if old.signed else writer.nonnegative(safe, old, slot)
    # Whoever divides by the root of a mean must not divide by 0 because others in the block are larger.
    codes = new.codes if old.signed else jnp.maximum(new.codes, (safe > 0).astype(jnp.uint8))
    changed = _CHANGED if old_value is None else jnp.where(value != old_value, _CHANGED, _UNCHANGED)
    fate = block_absmax(jnp.where(usable, changed, _UNUSABLE), old.block_size)
    absmax = jnp.where(fate == _UNUSABLE, np.float32(np.nan), new.absmax)
    if old_value is None:
        return dataclasses.replace(old, codes=codes, absmax=absmax)
    stays = per_element(fate, value.shape, old.block_size, devices_of(value)) == _UNCHANGED
    return dataclasses.replace(
        old,
        codes=jnp.where(stays, old.codes, codes),
        absmax=jnp.where(fate == _UNCHANGED, old.absmax, absmax),
    )
