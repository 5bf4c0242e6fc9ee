"""`QuantizedArray`: an array in 8 bits, the same on every backend (`docs/algorithm.md`, section 3).

Reference: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import absmax_shape, dynamic_codebook
from automagic_core.config.constants import MIN_ABSMAX
from automagic_optax.codec.nearest import nearest_code, stochastic_code, take
from automagic_optax.sharding.explicit_mesh import untyped
from automagic_optax.sharding.placement import devices_of, has_explicit_axes
from automagic_optax.sharding.state_shardings import absmax_sharding

RoundingRule = Callable[[jax.Array, bool, jax.Array | None], jax.Array]
"""(y, signed, random) → int32 codes: rounds y to nearest if random is None, else stochastically."""


def exact_rule(y: jax.Array, signed: bool, random: jax.Array | None) -> jax.Array:
    """The rounding of sections 3.5 and 3.6, which is that of bitsandbytes' CUDA kernel."""
    return nearest_code(y, signed) if random is None else stochastic_code(y, signed, random)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax"],
    meta_fields=["signed", "block_size"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array stored as one 8-bit code per element and one absmax per block.

    Attributes:
        codes: uint8, in the shape of the array.
        absmax: float32, the largest magnitude of each block: (*shape[:-1], shape[-1] // block_size) where the blocks
            lie inside the last axis, else (ceil(size / block_size),); (1,) where block_size is None.
        signed: which codebook the codes belong to (static).
        block_size: elements per block in row-major order, or None for one block of the whole array (static).
    """

    codes: jax.Array
    absmax: jax.Array
    signed: bool
    block_size: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.codes.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.codes.size

    def dequantize(self) -> jax.Array:
        """codebook · absmax in float32.  It does not square companded states; `codec.stored` does."""
        if has_explicit_axes(self.codes):
            found: jax.Array = untyped(QuantizedArray.dequantize, jax.typeof(self.codes).sharding)(self)
            return found
        values = take(dynamic_codebook(self.signed), self.codes.astype(jnp.int32))
        return values * per_element(self.absmax, self.shape, self.block_size, devices_of(self.codes))


def dequantize(array: QuantizedArray) -> jax.Array:
    """The float32 values of a stored array, as `QuantizedArray.dequantize`."""
    return array.dequantize()


def quantize(
    x: jax.Array,
    *,
    signed: bool = True,
    block_size: int | None = 256,
    random: jax.Array | None = None,
    rule: RoundingRule = exact_rule,
) -> QuantizedArray:
    """Stores an array in 8 bits: y = x · (1 / absmax), then the nearest of 256 values.

    Args:
        x: finite floating-point array of any shape; bfloat16, float16 and float64 are read as float32.  Negative
            values need the signed codebook.
        signed: the codebook from −0.993 to 1, or the one from 0 to 1.
        block_size: elements per block in row-major order, or None for one block of the whole array.
        random: r in [0, 1) for each element (`random_unit`), for stochastic rounding; None rounds to nearest.
        rule: how y becomes a code.  The parity suite passes the rule of another implementation here.

    Returns:
        The stored array.  A block whose largest magnitude is below 2⁻¹²⁰ is stored as zeros.

    Example:
        >>> q = quantize(jnp.linspace(-1.0, 1.0, 512))
        >>> q.codes.shape, q.absmax.shape
        ((512,), (2,))
    """
    return quantized(jnp.asarray(x), signed, block_size, random, rule)


def quantized(
    x: jax.Array,
    signed: bool,
    block_size: int | None,
    random: jax.Array | None,
    rule: RoundingRule,
    *,
    apart: bool = False,
) -> QuantizedArray:
    """`quantize`; `apart`: codes are not computed in the kernel that finds x and the absmax.

    A GPU otherwise may compute them in the kernel of another state's absmax, which then takes twice the whole step's
    time (docs/performance.md).
    """
    if has_explicit_axes(x):
        split: Any = jax.typeof(x).sharding
        absmax_split: Any = absmax_sharding(split, x.shape, block_size)
        types = QuantizedArray(split, absmax_split, signed, block_size)
        make = functools.partial(quantized, signed=signed, block_size=block_size, rule=rule, apart=apart)
        stored: QuantizedArray = untyped(lambda x, random: make(x, random=random), types)(x, random)
        return stored
    x = _constant(x.astype(jnp.float32))
    absmax = block_absmax(x, block_size)
    if apart:
        x, absmax = jax.lax.optimization_barrier((x, absmax))
    absmax = jnp.where(absmax < np.float32(MIN_ABSMAX), np.float32(0), absmax)
    zero_block = absmax == 0
    factor = jnp.where(zero_block, np.float32(0), _reciprocal(jnp.where(zero_block, np.float32(1), absmax)))
    factor = per_element(factor, x.shape, block_size, devices_of(x))
    codes = jnp.where(factor == 0, 0, rule(x * factor, signed, random)).astype(jnp.uint8)
    return QuantizedArray(codes, absmax, signed, block_size)


def _reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, correctly rounded.  XLA's float32 division on a GPU is not: one code in twenty thousand would change."""
    first = np.float32(1) / x
    if jax.default_backend() != "gpu":
        return first
    # Without the barrier each element of a block computes it anew, and few GPUs are fast in float64.
    exact: jax.Array = jax.lax.optimization_barrier(refined_reciprocal(x, first))
    return exact


def refined_reciprocal(x: jax.Array, first: jax.Array) -> jax.Array:
    """1 / x, correctly rounded, from an estimate, by two steps of Newton's method in float64.

    A compiler may turn a division in float64 whose result is rounded to float32 into one in float32.

    Args:
        x: float32, normal numbers, of any shape.
        first: 1 / x in float32, of x's shape, a few units in the last place off at most.

    Returns:
        float32 in the shape of x.
    """
    with jax.enable_x64(True):
        wide, found = (jax.lax.convert_element_type(value, np.float64) for value in (x, first))
        for _ in range(2):
            found = found + found * (1 - wide * found)
        return jax.lax.convert_element_type(found, np.float32)


@jax.custom_jvp
def _constant(x: jax.Array) -> jax.Array:
    """x, through which no derivative goes: codes have none, and that of the absmax alone would mislead."""
    return x


@_constant.defjvp
def _without_derivative(primals: Any, tangents: Any) -> Any:
    warnings.warn(
        "no derivative goes through states in 8 bits, they count as constants: for derivatives through the states use "
        "optim_bits=32",
        stacklevel=2,
    )
    return primals[0], jnp.zeros_like(primals[0])


def zeros(shape: tuple[int, ...], signed: bool, block_size: int | None) -> QuantizedArray:
    """An array of zeros in 8 bits: every code and every absmax is 0."""
    absmax = jnp.zeros(absmax_shape(shape, block_size), jnp.float32)
    return QuantizedArray(jnp.zeros(shape, jnp.uint8), absmax, signed, block_size)


def block_absmax(x: jax.Array, block_size: int | None) -> jax.Array:
    """The largest magnitude of each block, in the shape of `QuantizedArray.absmax`."""
    magnitude = jnp.abs(x)
    if block_size is None:
        return jnp.max(magnitude, initial=0).reshape(1)
    run = common_run(x.shape, block_size, devices_of(x))
    if run > 1:
        magnitude = jnp.max(_as_blocks(magnitude, run), axis=-1)
    return jnp.max(_as_blocks(magnitude, block_size // run), axis=-1, initial=0)


def common_run(shape: tuple[int, ...], block_size: int, devices: int) -> int:
    """The length of runs: neighbours inside one block and on one device, which are reduced to one value first.

    Where devices share a block, or blocks run over the ends of rows, forming blocks moves values between devices.  Runs
    make that one value per run instead of one per element.
    """
    if devices == 1 or not shape or shape[-1] == 0:
        return 1
    part = shape[-1] // math.gcd(shape[-1], devices)  # of the last axis, if all devices split it
    run = math.gcd(part, block_size)
    return run if run > 1 else math.gcd(shape[-1], block_size)


def per_element(per_block: jax.Array, shape: tuple[int, ...], block_size: int | None, devices: int) -> jax.Array:
    """Broadcasts one value per block to its elements."""
    if block_size is None:
        return jnp.broadcast_to(per_block.reshape((1,) * len(shape)), shape)
    run = common_run(shape, block_size, devices)
    if run > 1:
        per_run = per_element(per_block, (*shape[:-1], shape[-1] // run), block_size // run, 1)
        return jnp.broadcast_to(per_run[..., None], (*per_run.shape, run)).reshape(shape)
    spread = jnp.broadcast_to(per_block[..., None], (*per_block.shape, block_size))
    if _blocks_inside_last_axis(shape, block_size):
        return spread.reshape(shape)
    size = int(np.prod(shape, dtype=np.int64))
    return spread.reshape(-1)[:size].reshape(shape)


def _as_blocks(x: jax.Array, block_size: int) -> jax.Array:
    """x in shape (..., blocks, block_size); the last block is padded with zeros where it is short."""
    if _blocks_inside_last_axis(x.shape, block_size):
        return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)


def _blocks_inside_last_axis(shape: tuple[int, ...], block_size: int) -> bool:
    return bool(shape) and shape[-1] % block_size == 0
