"""The state of `scale_by_cameamp`: all arrays, one array, and one by flat names (`docs/algorithm.md`, section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from automagic_core import Config, StatePlan, absmax_shape, state_plan
from automagic_core.arrays.state_forms import COMPANDED, moment_of
from automagic_core.arrays.state_plan import Part
from automagic_core.config.constants import NARROW
from automagic_optax.arrays.containers import flatten_like, unflatten_like
from automagic_optax.codec.quantized_array import QuantizedArray, quantize
from automagic_optax.codec.stored import Stored, StoredMoment, moment_from, tensors_of
from automagic_optax.sharding.placement import devices_of, full, known_sharding, statistic_zeros, zeros_following
from automagic_optax.sharding.state_shardings import StateShardings

WARM_UP_ONLY = ("s", "walk")
"""What only the warm-up needs: the states of the torque and of the search."""
DROPPED = (*WARM_UP_ONLY, "last_polarity")
"""The fields of a state that `finish_warmup` drops."""


class ScaleByCameampState(NamedTuple):
    """The states of all arrays.

    Attributes:
        step: int32 scalar, t, the number of calls; stays at 2³¹ − 1.
        log_rate_scale: float32 scalar, ℓ, the logarithm of the factor on the learning rate that the search found.
        learning_rate: float32 scalar, η̂ of the last step; 0 before the first, also in states that 0.1.0 saved.
        walk_energy, agreement, peak_agreement: float32 scalars, E, A and P of the search; 0 at first.
        first_norm, gradient_norm: likewise F and G.

    All other fields are trees in the structure of the parameters; a leaf is None where its array has no such state,
    and `s` and `walk` are None as a whole after `finish_warmup`.  Without `walk` the search rests.

        age, skipped_steps: int32 scalars, the steps an array took and those in which it was skipped.
        torque_mean: float32 scalars, the mean of τ at the array's last step.
        background_scale: float32 scalars, the mean of √v̂ at the array's last step; of elementwise second moments.
        exp_avg, s: `QuantizedArray` or float32, in the array's shape.
        exp_avg_sq, exp_avg_res: `QuantizedArray` of the square root, float32, or `RowColumn`.
        last_polarity: None but in a state that 0.1.0 saved, whose signs of gradients are carried without effect.
        lr_mask, spatial_variance: float32 row statistics, δ and the variance of d.
        walk: a float32 row statistic, the sum of the steps times their signs.
    """

    step: jax.Array
    log_rate_scale: jax.Array
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
    learning_rate: Any = np.float32(0)
    walk: Any = None
    walk_energy: Any = np.float32(0)
    agreement: Any = np.float32(0)
    peak_agreement: Any = np.float32(0)
    first_norm: Any = np.float32(0)
    gradient_norm: Any = np.float32(0)


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
    lr_mask: jax.Array | None
    spatial_variance: jax.Array | None
    walk: jax.Array | None = None


class Search(NamedTuple):
    """What the search of all arrays holds, under the same names: float32 scalars."""

    log_rate_scale: jax.Array
    walk_energy: jax.Array
    agreement: jax.Array
    peak_agreement: jax.Array
    first_norm: jax.Array
    gradient_norm: jax.Array

    @staticmethod
    def of(state: ScaleByCameampState) -> Search:
        """The search of a state."""
        return Search(*(getattr(state, name) for name in Search._fields))


def initial_state(plan: StatePlan, parameter: Any = None) -> ArrayState:
    """The states of one array before its first step: all zeros, but torque_mean = 1.

    Args:
        plan: says which states there are and in which form.
        parameter: the array; its states are split over its mesh as it is.
    """
    split = StateShardings(known_sharding(parameter), plan)
    # Where only the compiler knows how the parameter is split, the states are computed from zeros that are split alike.
    zeros = zeros_following(parameter) if devices_of(parameter) > 1 and known_sharding(parameter) is None else None

    def scalar(value: int, dtype: Any) -> jax.Array:
        return full((), value, dtype, split.scalar)

    def row_statistic() -> jax.Array:
        return statistic_zeros(parameter, plan.row_shape)

    def stored(part: Part, signed: bool) -> Stored:
        if zeros is not None:
            of_part = zeros if part.shape == plan.shape else statistic_zeros(parameter, part.shape)
            return quantize(of_part, signed=signed, block_size=plan.block_size) if part.coded else of_part
        sharding = split.part(part.shape)
        if not part.coded:
            return full(part.shape, 0, jnp.float32, sharding)
        absmax = full(absmax_shape(part.shape, plan.block_size), 0, jnp.float32, split.absmax(part.shape))
        return QuantizedArray(full(part.shape, 0, jnp.uint8, sharding), absmax, signed, plan.block_size)

    def moment(name: str) -> Any:
        parts = {part: stored(form, signed=name not in COMPANDED) for part, form in plan.parts(name).items()}
        return moment_from(parts, name)

    return ArrayState(
        age=scalar(0, jnp.int32),
        skipped_steps=scalar(0, jnp.int32),
        torque_mean=scalar(1, jnp.float32),
        background_scale=scalar(0, jnp.float32) if plan.has_background_scale else None,
        exp_avg=moment("exp_avg"),
        exp_avg_sq=moment("exp_avg_sq"),
        exp_avg_res=moment("exp_avg_res"),
        s=moment("s") if plan.has_s else None,
        lr_mask=row_statistic() if plan.has_lr_mask else None,
        spatial_variance=row_statistic() if plan.has_spatial_variance else None,
        walk=row_statistic() if plan.has_walk else None,
    )


def absent_states(config: Config) -> frozenset[str]:
    """The fields that are None as a whole in a new state, whatever the arrays are."""
    # Two arrays, neither of them narrow, have together every state that any array has.
    plans = [state_plan((NARROW + 1,) * axes, config, "flax") for axes in (1, 2)]
    optional = ("s", "walk", "lr_mask", "spatial_variance", "background_scale")
    return frozenset(name for name in optional if not any(getattr(plan, f"has_{name}") for plan in plans))


def gather_states(
    params: Any,
    step: jax.Array,
    search: Search,
    arrays: list[ArrayState],
    absent: frozenset[str],
    learning_rate: jax.Array,
    last_polarity: Any = None,
) -> ScaleByCameampState:
    """Puts the states of each array into one tree for each name.

    Args:
        params: gives the structure.
        absent: names whose field is None as a whole, instead of a tree of Nones.
    """
    trees: dict[str, Any] = {
        name: None if name in absent else unflatten_like(params, [getattr(array, name) for array in arrays])
        for name in ArrayState._fields
    }
    shared: dict[str, Any] = search._asdict()
    return ScaleByCameampState(step, learning_rate=learning_rate, last_polarity=last_polarity, **shared, **trees)


def scatter_states(params: Any, state: ScaleByCameampState) -> list[ArrayState]:
    """The states of each array, in the order of the leaves of `params`."""
    count = len(jax.tree.leaves(params))

    def leaves(name: str) -> list[Any]:
        tree = getattr(state, name)
        return [None] * count if tree is None else flatten_like(params, tree)

    columns = [leaves(name) for name in ArrayState._fields]
    return [ArrayState(*values) for values in zip(*columns, strict=True)]


def flat_fields(array: ArrayState) -> dict[str, Any]:
    """The states of one array by their flat names."""
    fields: dict[str, Any] = {}
    for field, moment in array._asdict().items():
        for name, value in tensors_of(moment, field).items():
            if isinstance(value, QuantizedArray):
                fields |= {name: value.codes, f"{name}_absmax": value.absmax}
            elif value is not None:
                fields[name] = value
    return fields


def array_state(states: Mapping[str, np.ndarray], plan: StatePlan, warming: bool) -> ArrayState:
    """The states of one array, copied.

    Args:
        states: by flat name, as `automagic_core.arrays.state_forms.check_forms` accepts them; empty before the first
            step.
        plan: the array's plan; `states` decides between 8 and 32 bits.
        warming: whether the run is warming up; used where `states` is empty.
    """
    if not states:
        array = initial_state(plan)
        gone: dict[str, Any] = dict.fromkeys(WARM_UP_ONLY)
        return array if warming else array._replace(**gone)

    def part(name: str) -> Any:
        if f"{name}_absmax" in states:
            codes, absmax = jnp.array(states[name]), jnp.array(states[f"{name}_absmax"])
            return QuantizedArray(codes, absmax, moment_of(name) not in COMPANDED, plan.block_size)
        return jnp.array(states[name])

    def held(field: str) -> Any:
        parts = {name: part(name) for name in (field, f"{field}_row", f"{field}_col") if name in states}
        return moment_from(parts, field) if parts else None

    return ArrayState(**{field: held(field) for field in ArrayState._fields})
