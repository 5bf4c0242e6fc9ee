"""The states of `scale_by_cameamp` (section 6): as a tree for each name, and as one record for each array."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from automagic_core import StatePlan
from automagic_core.codec.blocks import Shape
from automagic_optax.arrays.flax_variables import flatten_like, unflatten_like
from automagic_optax.codec import quantized_array as codec
from automagic_optax.codec.polarity import pack_bits
from automagic_optax.codec.stored import RowColumn, Stored, StoredMoment
from automagic_optax.sharding.placement import devices_of, full, known_sharding, zeros_following, zeros_in_shape
from automagic_optax.sharding.state_shardings import StateShardings


class ScaleByCameampState(NamedTuple):
    """The states of all arrays.

    Attributes:
        step: int32 scalar, t, the number of calls; saturates at 2³¹ − 1.
        lr_scale: float32 scalar, ℓ, the logarithm of the factor on the learning rate that the votes found.

    All other fields are trees in the structure of the parameters; a leaf is None where its array has no such state,
    and `s` and `last_polarity` are None as a whole after `finish_warmup`.

        age, skipped_steps: int32 scalars, the steps an array took and those skipped for a non-finite gradient.
        torque_mean, background_scale: float32 scalars, the means of τ and of √v̂ at the array's last step.
        exp_avg, s: `QuantizedArray` or float32, in the array's shape.
        exp_avg_sq, exp_avg_res: `QuantizedArray` of the square root, float32, or `RowColumn`.
        last_polarity: uint8, packed sign bits.
        lr_mask, spatial_variance: float32 row statistics, δ and the variance of d.
    """

    step: jax.Array
    lr_scale: jax.Array
    age: Any
    skipped_steps: Any
    torque_mean: Any
    background_scale: Any
    exp_avg: Any
    exp_avg_sq: Any
    exp_avg_res: Any
    s: Any
    last_polarity: Any
    lr_mask: Any
    spatial_variance: Any


class ArrayState(NamedTuple):
    """The states of one array, under the same names; None where it has none."""

    age: jax.Array
    skipped_steps: jax.Array
    torque_mean: jax.Array
    background_scale: jax.Array | None
    exp_avg: Stored
    exp_avg_sq: StoredMoment
    exp_avg_res: StoredMoment
    s: Stored | None
    last_polarity: jax.Array | None
    lr_mask: jax.Array | None
    spatial_variance: jax.Array | None


def initial_state(plan: StatePlan, parameter: Any = None) -> ArrayState:
    """The states of one array before its first step: all zeros, but for τ̄ = 1.

    Args:
        plan: how they are kept.
        parameter: the array whose states they are; they are split over its mesh as it is.
    """
    if parameter is not None and devices_of(parameter) > 1 and known_sharding(parameter) is None:
        return _following(plan, parameter)
    split = StateShardings(None if parameter is None else known_sharding(parameter), plan)

    def elementwise(signed: bool) -> Stored:
        if not plan.quantized:
            return full(plan.shape, 0, jnp.float32, split.elementwise)
        codes = full(plan.shape, 0, jnp.uint8, split.elementwise)
        return codec.QuantizedArray(
            codes, full(plan.absmax_shape, 0, jnp.float32, split.absmax), signed, plan.block_size
        )

    def statistic(shape: Shape) -> jax.Array:
        return full(shape, 0, jnp.float32, split.statistic(shape))

    def moment(factored: bool) -> StoredMoment:
        if not factored:
            return elementwise(signed=False)
        return RowColumn(statistic(plan.row_shape), statistic(plan.column_shape))

    return ArrayState(
        age=full((), 0, jnp.int32, split.scalar),
        skipped_steps=full((), 0, jnp.int32, split.scalar),
        torque_mean=full((), 1, jnp.float32, split.scalar),
        background_scale=full((), 0, jnp.float32, split.scalar),
        exp_avg=elementwise(signed=True),
        exp_avg_sq=moment(plan.factored_sq),
        exp_avg_res=moment(plan.factored_res),
        s=elementwise(signed=True) if plan.has_s else None,
        last_polarity=full(plan.polarity_shape, 0, jnp.uint8, split.polarity) if plan.has_last_polarity else None,
        lr_mask=statistic(plan.row_shape) if plan.has_lr_mask else None,
        spatial_variance=statistic(plan.row_shape) if plan.has_spatial_variance else None,
    )


def _following(plan: StatePlan, parameter: jax.Array) -> ArrayState:
    """The same where only the compiler knows how the parameter is split: computed from zeros that follow it."""
    zeros = zeros_following(parameter)

    def elementwise(signed: bool) -> Stored:
        return codec.quantize(zeros, signed=signed, block_size=plan.block_size) if plan.quantized else zeros

    def moment(factored: bool) -> StoredMoment:
        if not factored:
            return elementwise(signed=False)
        return RowColumn(zeros_in_shape(zeros, plan.row_shape), zeros_in_shape(zeros, plan.column_shape))

    alone = initial_state(plan)
    return alone._replace(
        exp_avg=elementwise(signed=True),
        exp_avg_sq=moment(plan.factored_sq),
        exp_avg_res=moment(plan.factored_res),
        s=elementwise(signed=True) if plan.has_s else None,
        last_polarity=None if alone.last_polarity is None else pack_bits(zeros != 0),
        lr_mask=None if alone.lr_mask is None else zeros_in_shape(zeros, plan.row_shape),
        spatial_variance=None if alone.spatial_variance is None else zeros_in_shape(zeros, plan.row_shape),
    )


def gather_states(
    params: Any, step: jax.Array, lr_scale: jax.Array, arrays: list[ArrayState], absent: frozenset[str]
) -> ScaleByCameampState:
    """One tree for each name from one record for each array.

    Args:
        params: gives the structure.
        absent: names that no array keeps; their field is None instead of a tree of Nones.
    """
    trees = {
        name: None if name in absent else unflatten_like(params, [getattr(array, name) for array in arrays])
        for name in ArrayState._fields
    }
    return ScaleByCameampState(step=step, lr_scale=lr_scale, **trees)


def scatter_states(params: Any, state: ScaleByCameampState) -> list[ArrayState]:
    """One record for each array, in the order of the leaves of `params`, which gives the structure."""
    count = len(jax.tree.leaves(params))

    def leaves(name: str) -> list[Any]:
        tree = getattr(state, name)
        return [None] * count if tree is None else flatten_like(params, tree)

    columns = [leaves(name) for name in ArrayState._fields]
    return [ArrayState(*values) for values in zip(*columns, strict=True)]
