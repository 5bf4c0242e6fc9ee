"""States that go from 32 to 8 bits in the course of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from automagic_core import Config, Slot
from automagic_core.moving.progressive import progressive_min_8bit_size
from automagic_optax.arrays.flax_variables import flatten_like, pure, unflatten_like
from automagic_optax.arrays.leaves import nnx_class
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.cameamp.find_states import find_states, map_states
from automagic_optax.cameamp.states import ScaleByCameampState
from automagic_optax.codec import quantized_array as codec
from automagic_optax.codec.stored import RowColumn, Writer

_SLOTS = {"exp_avg": Slot.exp_avg, "exp_avg_sq": Slot.exp_avg_sq, "exp_avg_res": Slot.exp_avg_res, "s": Slot.s}


def progressive_quantization(
    opt_state: Any,
    step: int,
    total_steps: int,
    *,
    config: Config | None = None,
    params: Any = None,
    embedding: Mark = None,
) -> Any:
    """Moves states to 8 bits as a run goes on, the largest arrays first.

    The first 20 % of the steps nothing moves.  In the middle 60 % arrays of at least a threshold have 8 bits; it falls
    geometrically from 8192 to 2048 elements.  The last 20 % every array has, but for embeddings under `stable_emb`.
    An array moves once, by quantizing its states as they stand, with the random bits of the state's last step: the
    codes are those that the array would have if that step had stored 8 bits.

    Begin with states in 32 bits: ``automagic_8bit(..., optim_bits=32)``.  Its update keeps every array in the form in
    which it is, so the transformation stays the same throughout.

    Call it between jitted steps, not inside one.  A jitted step compiles once more each time that something moved,
    and a call that moves nothing returns the arrays as they are.  Once every ``total_steps // 50`` steps is often
    enough, and bounds the number of compilations; fewer sizes of arrays than that move fewer times.  To restore a
    checkpoint, call it on ``tx.init(params)`` with the step of the last call: that gives the form that was saved.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped, also that of an
            ``nnx.Optimizer``.
        step: how many steps are over, a Python integer.
        total_steps: how many there will be.
        config: the hyperparameters in use; `block_size`, `block_wise`, `stochastic_rounding` and `stable_emb` matter.
        params: the parameters; needed under `stable_emb` to find the embeddings.
        embedding: as for ``automagic_8bit``.

    Returns:
        The state in the form of the phase.

    Raises:
        ValueError: the state holds none of this optimizer's states; a number outside its range; `params` missing.
        TypeError: a traced `step`.

    Example:
        >>> if step % 200 == 0:
        ...     opt_state = progressive_quantization(opt_state, step, 10_000)
    """
    if isinstance(step, jax.core.Tracer):
        raise TypeError("step is traced: call progressive_quantization between jitted steps, with a Python integer")
    config = Config() if config is None else config
    find_states(opt_state)
    size = progressive_min_8bit_size(int(step), total_steps)
    tables: Any = None
    if config.stable_emb:
        if params is None:
            raise ValueError("stable_emb keeps embeddings in 32 bits: params are needed to find them")
        tables = unflatten_like(pure(params), resolve_mark(embedding, params, "embedding"))

    def moved(state: ScaleByCameampState) -> ScaleByCameampState:
        count = len(flatten_like(state.age, state.age))
        # Where a mask has taken leaves out, the state's own tree lacks them.
        stays = [False] * count if tables is None else resolve_mark(tables, state.age, "embedding")
        writer = Writer(pure(state.step), config.stochastic_rounding)
        # What an nnx.Optimizer holds its other arrays in.
        holders = [x for x in jax.tree.leaves(state.age, is_leaf=_is_variable) if _is_variable(x)]
        hold: Callable[[Any], Any] = holders[0].replace if holders else lambda array: array

        def one(stored: Any, stay: bool, slot: Slot) -> Any:
            value = pure(stored)
            if stay or not isinstance(value, jax.Array) or not 0 < value.size >= size:
                return stored
            signed = slot in (Slot.exp_avg, Slot.s)
            like = codec.zeros(value.shape, signed, config.absmax_block_size)
            new: Any = (writer.signed if signed else writer.nonnegative)(value, like, slot)
            codes = stored.replace(new.codes) if _is_variable(stored) else new.codes
            return codec.QuantizedArray(codes, hold(new.absmax), new.signed, new.block_size)

        trees = {}
        for name, slot in _SLOTS.items():
            leaves, structure = jax.tree.flatten(getattr(state, name), is_leaf=_is_stored)
            if leaves:
                new = [one(leaf, stay, slot) for leaf, stay in zip(leaves, stays, strict=True)]
                trees[name] = jax.tree.unflatten(structure, new)
        return state._replace(**trees)

    return map_states(moved, opt_state)


def _is_variable(x: Any) -> bool:
    variable = nnx_class("Variable")
    return variable is not None and isinstance(x, variable)


def _is_stored(x: Any) -> bool:
    return _is_variable(x) or isinstance(x, (codec.QuantizedArray, RowColumn))
