"""`quantize_state`: stores the moments of any optax transformation in 8 bits (`docs/algorithm.md`, section 12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path

from automagic_core import MAX_STEP, Config
from automagic_optax.arrays.containers import content, is_container, pure, refilled
from automagic_optax.arrays.leaves import Path
from automagic_optax.arrays.own_rules import under_own_rules
from automagic_optax.arrays.parameter_places import Place, parameter_places
from automagic_optax.codec.stored import Writer
from automagic_optax.moments.in_turn import in_turn
from automagic_optax.moments.moment_kinds import begins_with_parameters, is_kept, is_nonnegative
from automagic_optax.moments.moments import Moments
from automagic_optax.moments.quantized_moment import QuantizedMoment, first_moment
from automagic_optax.sharding.placement import following, scalar_like, varies

Nonnegative = Callable[[Path, Any], bool | None]
_DTYPES = ("float32", "bfloat16", "float16")


class QuantizedState(NamedTuple):
    """The state of a transformation wrapped by `quantize_state`.

    Attributes:
        step: int32 scalar, the number of updates, for the random bits; stays at 2³¹ − 1.
        inner_state: the transformation's own state, with a `QuantizedMoment` in place of each array that has 8 bits.
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
    """Stores the moments of any optax transformation in 8 bits.

    Before each update of `tx` its states are read, and afterwards they are stored again.  `tx` sees its usual dtypes.
    An array of its state has 8 bits when

    - it is in a tree in the structure of the parameters and has its parameter's shape,
    - it is float32, bfloat16 or float16 and has at least `min_8bit_size` elements,
    - it begins at a constant.  An array that begins with the values of the parameters, such as the `z` of
      schedule-free, is a parameter itself, and 8 bits would move it by more than small steps do,
    - `moment_kinds.is_kept` does not name it (the states of centered RMSprop, MADGRAD, COCOB, L-BFGS and line searches,
      GaLore's projector, the momentum of MoMo, the gradients that ``optax.MultiSteps`` sums up).  Such states are
      compared with each other or with exact averages, become parameters or are no moments.

    States that are never negative are stored as their square roots with the unsigned codebook, all others as they are
    with the signed one; of these roots none but 0 is stored as 0.  A block with a value that cannot be stored, such as
    NaN, reads as NaN as a whole.  Put ``optax.apply_if_finite`` around `quantize_state` where gradients may not be
    finite.

    Inside `quantize_state` a clipping of updates, or a wrapper with branches (``optax.MultiSteps``,
    ``optax.apply_if_finite``), needs all float32 states in memory at once.  Put those around it.
    ``optax.lookahead``, ``optax.flatten`` and ``split_real_and_imaginary`` belong around it too: inside, the wrapped
    transformation has other trees than the parameters, and nothing gets 8 bits.

    No derivative goes through states in 8 bits: they count as constants.

    ``optax.tree.map_params`` cannot pair a state in 8 bits with another tree, such as one of specs; `state_specs` gives
    the specs of a whole state.

    Args:
        tx: any transformation.
        min_8bit_size: smaller arrays stay as they are.
        block_size: elements per block, a power of two from 64 to 4096.
        stochastic_rounding: without it moving averages with a decay of 0.999 stall.
        nonnegative: (path in the state of `tx`, array) → whether this state is never negative.  For None as answer, or
            without the function, the name decides (`nu`, `v`, `exp_avg_sq`, `sum_of_squares` and others).  A block of
            such a state reads as NaN once it has a negative value.

    Returns:
        A transformation with the arguments of `tx`.  Its state is a `QuantizedState`.

    Raises:
        ValueError: an argument outside its range; an update that was given another state than a `QuantizedState`; a
            transformation whose update changes the structure of its state or the shape of a state in 8 bits.

    References:
        Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861.

    Example:
        >>> tx = quantize_state(optax.adamw(1e-3))
    """
    if any(isinstance(x, jax.Array) for x in (min_8bit_size, block_size, nonnegative)):
        raise ValueError(
            "min_8bit_size, block_size or nonnegative is a jax.Array, and they decide what is stored; give "
            "inject_hyperparams static_args=('min_8bit_size', 'block_size', 'nonnegative'), or put it inside: "
            "quantize_state(inject_hyperparams(tx)(...))"
        )
    fields = Config(min_8bit_size=min_8bit_size, block_size=block_size, stochastic_rounding=stochastic_rounding)
    min_8bit_size, block_size = fields.min_8bit_size, fields.block_size
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
            and array.shape == jnp.shape(place.parameter)
            and array.size >= min_8bit_size
            and not is_kept(place.owner, place.field)
        )

    def init(params: Any) -> QuantizedState:
        state = tx.init(params)
        step = scalar_like(params, 0, jnp.int32)
        chosen = {p.path: p for p in parameter_places(params, state, tx.init, _is_stored) if has_8_bits(p)}
        if not chosen:
            return QuantizedState(step, state)
        # In `copies` a container is still a node with its array below it.
        copies = jax.tree.unflatten(jax.tree.structure(state), begins_with_parameters(tx.init, params))
        structure: Any  # JAX's stubs lack its methods
        nodes, structure = tree_flatten_with_path(state, is_leaf=_is_stored_or_container)
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
        if not isinstance(state, QuantizedState):
            raise ValueError(
                f"the state given to quantize_state is a {type(state).__name__} and no QuantizedState: "
                "begin with quantize_state(tx).init(params)"
            )
        step = jnp.minimum(pure(state.step), MAX_STEP - 1) + 1
        structure: Any
        leaves, structure = jax.tree.flatten(state.inner_state, is_leaf=_is_stored)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, QuantizedMoment)]
        moments = Moments([pure(leaves[i]) for i in positions], Writer(step, stochastic_rounding))
        result_structure: Any = None

        def inner_update(values: list[Any]) -> tuple[list[Any], list[Any]]:
            nonlocal result_structure
            old = list(leaves)
            for i, value in zip(positions, values, strict=True):
                old[i] = _held_like(leaves[i].codes, value)
            new_updates, new_state = tx.update(updates, structure.unflatten(old), params, **extra_args)
            new = _flatten_as_before(structure, new_state)
            rest = [None if isinstance(x, QuantizedMoment) else y for x, y in zip(leaves, new, strict=True)]
            flat, result_structure = jax.tree.flatten((new_updates, rest))
            return flat, [pure(new[i]) for i in positions]

        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((updates, state, params)))
        # In turn, moments must be of the type that the trace has seen, which a gradient that varies alone would change.
        of_one_kind = len({varies(x) for x in [*jax.tree.leaves(updates), *(m.codes for m in moments.stored)]}) < 2
        if traced and of_one_kind:
            results = in_turn(inner_update, moments.shapes(), moments, moments)
        else:
            results, values = inner_update([moments.read(i) for i in range(len(positions))])
            for i, value in enumerate(values):
                moments.write(i, value)
        new_updates, new = jax.tree.unflatten(result_structure, results)
        for i, moment in zip(positions, moments.stored, strict=True):
            new[i] = dataclasses.replace(moment, codes=_held_like(leaves[i].codes, moment.codes))
        return new_updates, QuantizedState(step, structure.unflatten(new))

    return under_own_rules(optax.GradientTransformationExtraArgs(init, update))


def _flatten_as_before(structure: Any, state: Any) -> list[Any]:
    """For each leaf of the old state, the part of a new state at its position."""
    try:
        found: list[Any] = structure.flatten_up_to(state)
        return found
    except ValueError as error:
        raise ValueError(
            f"the update of the wrapped transformation changed the structure of its state: {error}"
        ) from None


def _is_stored(x: Any) -> bool:
    """An 8-bit state, or the whole state of a `quantize_state` inside the wrapped transformation."""
    return isinstance(x, (QuantizedMoment, QuantizedState))


def _is_stored_or_container(x: Any) -> bool:
    return _is_stored(x) or is_container(x)


def _held_like(node: Any, value: Any) -> Any:
    """The value, in a container like `node` if it is one."""
    return refilled(node, _held_like(content(node), value)) if is_container(node) else value
