"""`quantize_state`: any optax transformation with its moments in 8 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path

from automagic_core import MAX_STEP, Config
from automagic_optax.arrays.flax_variables import is_variable, pure
from automagic_optax.arrays.parameter_places import Path, Place, parameter_places
from automagic_optax.codec.stored import Writer
from automagic_optax.moments.in_turn import in_turn
from automagic_optax.moments.moment_kinds import begins_with_parameters, is_kept, is_nonnegative
from automagic_optax.moments.moments import Moments
from automagic_optax.moments.quantized_moment import QuantizedMoment, first_moment
from automagic_optax.sharding.placement import following, scalar_like

Nonnegative = Callable[[Path, Any], bool | None]
_DTYPES = ("float32", "bfloat16", "float16")


class QuantizedState(NamedTuple):
    """The state of a transformation wrapped by `quantize_state`.

    Attributes:
        step: int32 scalar, the number of updates, which the random bits depend on; saturates at 2³¹ − 1.
        inner_state: the transformation's own state with a `QuantizedMoment` in place of each array that has 8 bits.
    """

    step: jax.Array
    inner_state: Any


def quantize_state(
    tx: optax.GradientTransformation,
    min_8bit_size: int = 4096,
    block_size: int = 256,
    stochastic_rounding: bool = True,
    nonnegative: Nonnegative | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any optax transformation in 8 bits (section 3).

    Before an update of `tx` its states are read as they were, after it they are stored again; `tx` itself and the
    dtypes that it sees stay the same.  An array of its state has 8 bits when

    - it stands in a tree in the structure of the parameters and has its parameter's shape,
    - it is float32, bfloat16 or float16 and has at least `min_8bit_size` elements,
    - it begins at a constant.  What begins with the values of the parameters, as the `z` of schedule-free does, is no
      moment but a parameter: rounding it is noise of its own size, more than a step at a small rate moves it,
    - its state is none of `moment_kinds.KEPT`: the centered second moment of RMSprop, MADGRAD, COCOB, L-BFGS and line
      searches compare states with each other or make parameters of them.

    States that are never negative are stored as their square roots with the unsigned map, others as they are with the
    signed one.  A block with a value that is not finite reads as NaN as a whole: such a value never turns into a
    number, but it spreads to its block.  Put ``optax.apply_if_finite`` around `quantize_state` where gradients may be
    such.

    What couples the parameters' updates after the states were read, as a clipping of updates does, needs all float32
    states in memory at once; so do wrappers with branches (``optax.MultiSteps``, ``optax.apply_if_finite``): put those
    around `quantize_state` and not into it.

    Args:
        tx: any transformation.
        min_8bit_size: smaller arrays stay as they are.
        block_size: elements per scale, a power of two from 64 to 4096.
        stochastic_rounding: without it moving averages with a decay of 0.999 stall.
        nonnegative: (path in the state of `tx`, array) → whether this state is never negative; None leaves the answer
            to the known names (`nu`, `v`, `exp_avg_sq`, `sum_of_squares` and others, and the `n` of Adan).  A block of
            a state that is said to be so reads as NaN once it has a negative value.

    Returns:
        A transformation with the arguments of `tx`.  Its state is a `QuantizedState`.

    Raises:
        ValueError: an argument outside its range; a transformation whose update changes the structure of its state or
            the shape of a state in 8 bits.

    References:
        Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861.

    Example:
        >>> tx = quantize_state(optax.adamw(1e-3))
    """
    Config(min_8bit_size=min_8bit_size, block_size=block_size, stochastic_rounding=stochastic_rounding).validate()
    if nonnegative is not None and not callable(nonnegative):
        raise ValueError(f"nonnegative = {nonnegative!r} is not valid; valid: None, a function of (path, leaf)")
    tx = optax.with_extra_args_support(tx)

    def is_signed(place: Place) -> bool:
        answer = None if nonnegative is None else nonnegative(place.path, place.array)
        return not (is_nonnegative(place.owner, place.field) if answer is None else answer)

    def has_8_bits(place: Place) -> bool:
        array = place.array
        return (
            isinstance(array, jax.Array)
            and str(array.dtype) in _DTYPES
            and array.shape == place.parameter.shape
            and array.size >= min_8bit_size
            and not is_kept(place.owner)
        )

    def init(params: Any) -> QuantizedState:
        state = tx.init(params)
        step = scalar_like(params, 0, jnp.int32)
        chosen = {p.path: p for p in parameter_places(params, state, tx.init, _is_stored) if has_8_bits(p)}
        if not chosen:
            return QuantizedState(step, state)
        # A Variable counts as the array that it holds: whether that is a copy is found below it.
        copies = jax.tree.unflatten(jax.tree.structure(state), begins_with_parameters(tx.init, params))
        structure: Any
        nodes, structure = tree_flatten_with_path(state, is_leaf=_is_stored_or_variable)
        is_copy = structure.flatten_up_to(copies)
        new = []
        for (path, node), copy in zip(nodes, is_copy, strict=True):
            place = chosen.get(path)
            if place is None or any(jax.tree.leaves(copy)):
                new.append(node)
                continue
            moment = first_moment(following(place.array, place.parameter), is_signed(place), block_size)
            new.append(dataclasses.replace(moment, codes=_held_like(node, moment.codes)))
        return QuantizedState(step, jax.tree.unflatten(structure, new))

    def update(
        updates: Any, state: QuantizedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, QuantizedState]:
        step = jnp.minimum(pure(state.step), MAX_STEP - 1) + 1
        structure: Any
        leaves, structure = jax.tree.flatten(state.inner_state, is_leaf=_is_stored)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, QuantizedMoment)]
        moments = Moments([pure(leaves[i]) for i in places], Writer(step, stochastic_rounding))
        form: Any = None

        def inner_update(values: list[Any]) -> tuple[list[Any], list[Any]]:
            nonlocal form
            old = list(leaves)
            for i, value in zip(places, values, strict=True):
                old[i] = _held_like(leaves[i].codes, value)
            new_updates, new_state = tx.update(updates, structure.unflatten(old), params, **extra_args)
            new = _flatten_as_before(structure, new_state)
            values = [pure(new[i]) for i in places]
            flat, form = jax.tree.flatten((new_updates, [None if i in set(places) else x for i, x in enumerate(new)]))
            return flat, values

        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((updates, state, params))):
            results = in_turn(inner_update, moments.shapes(), moments)
        else:
            results, values = inner_update([moments.read(i) for i in range(len(places))])
            for i, value in enumerate(values):
                moments.write(i, value)
        new_updates, new = jax.tree.unflatten(form, results)
        for i, moment in zip(places, moments.stored, strict=True):
            new[i] = dataclasses.replace(moment, codes=_held_like(leaves[i].codes, moment.codes))
        return new_updates, QuantizedState(step, structure.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def _flatten_as_before(structure: Any, state: Any) -> list[Any]:
    """What stands in a new state at each leaf of the old one."""
    try:
        return structure.flatten_up_to(state)
    except ValueError as error:
        raise ValueError(
            f"the update of the wrapped transformation changed the structure of its state: {error}"
        ) from None


def _is_stored(x: Any) -> bool:
    """A state that has 8 bits; what a `quantize_state` inside the wrapped transformation keeps is left to it."""
    return isinstance(x, (QuantizedMoment, QuantizedState))


def _is_stored_or_variable(x: Any) -> bool:
    return _is_stored(x) or is_variable(x)


def _held_like(node: Any, value: Any) -> Any:
    """The value in a Variable like `node`, if that is one."""
    return node.replace(value) if is_variable(node) else value
