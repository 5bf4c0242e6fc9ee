"""The states of `scale_by_cameamp` (section 6): as a tree for each name, and as one record for each array."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from automagic_core import StatePlan
from automagic_optax import codec
from automagic_optax.flax_variables import flatten_like, unflatten_like
from automagic_optax.stored import RowColumn, Stored, StoredMoment


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


def initial_state(plan: StatePlan) -> ArrayState:
    """The states of one array before its first step: all zeros, but for τ̄ = 1."""

    def elementwise(signed: bool) -> Stored:
        if plan.quantized:
            return codec.zeros(plan.shape, signed, plan.block_size)
        return jnp.zeros(plan.shape, jnp.float32)

    def moment(factored: bool) -> StoredMoment:
        if not factored:
            return elementwise(signed=False)
        return RowColumn(jnp.zeros(plan.row_shape, jnp.float32), jnp.zeros(plan.column_shape, jnp.float32))

    def row(present: bool) -> jax.Array | None:
        return jnp.zeros(plan.row_shape, jnp.float32) if present else None

    return ArrayState(
        age=jnp.zeros([], jnp.int32),
        skipped_steps=jnp.zeros([], jnp.int32),
        torque_mean=jnp.ones([], jnp.float32),
        background_scale=jnp.zeros([], jnp.float32),
        exp_avg=elementwise(signed=True),
        exp_avg_sq=moment(plan.factored_sq),
        exp_avg_res=moment(plan.factored_res),
        s=elementwise(signed=True) if plan.has_s else None,
        last_polarity=jnp.zeros(plan.polarity_shape, jnp.uint8) if plan.has_last_polarity else None,
        lr_mask=row(plan.has_lr_mask),
        spatial_variance=row(plan.has_spatial_variance),
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
