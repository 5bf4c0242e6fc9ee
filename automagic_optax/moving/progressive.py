"""Quantizes 32-bit states step by step while a run goes on (`docs/algorithm.md`, section 10.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from automagic_core import Config
from automagic_core.arrays.state_forms import COMPANDED, SLOTS
from automagic_core.arrays.state_plan import long_statistic
from automagic_core.moving.progressive import progressive_min_8bit_size
from automagic_optax.arrays.containers import (
    flatten_like,
    is_container,
    is_stored,
    is_variable,
    pure,
    refilled,
    unflatten_like,
)
from automagic_optax.arrays.marks import Mark, resolve_mark
from automagic_optax.cameamp.find_states import find_states, map_states
from automagic_optax.cameamp.states import ScaleByCameampState
from automagic_optax.codec.quantized_array import QuantizedArray, zeros
from automagic_optax.codec.stored import RowColumn, Writer


def progressive_quantization(
    opt_state: Any,
    step: int,
    total_steps: int,
    *,
    config: Config | None = None,
    params: Any = None,
    embedding: Mark = None,
) -> Any:
    """Quantizes states while a run goes on, the largest arrays first.

    In the first 20 % of the steps no array has 8 bits.  In the middle 60 % arrays from a threshold on have 8 bits, and
    the threshold falls geometrically from 8192 to 2048 elements.  In the last 20 % all arrays have 8 bits, except
    embeddings under `stable_emb`.  An array is quantized once, with the random bits of the state's last step: it
    gets the codes that it would have if that step had stored 8 bits.

    Of a state that ``jax.vmap`` made the sizes, blocks and random bits are those of each member.

    Begin with ``automagic_8bit(..., optim_bits=32)`` and keep this transformation: its update keeps the form of every
    array.

    Call it between jitted steps, not inside one.  A jitted step compiles once more after each call that quantized
    something, so call it every ``total_steps // 50`` steps.  To restore a checkpoint, call it on ``tx.init(params)``
    with the step of the last call: Orbax and flax restore into that, since it has the form that was saved.

    Args:
        opt_state: any state that contains a `ScaleByCameampState`, however it is wrapped, also that of an
            ``nnx.Optimizer``.
        step: how many steps are over, a Python integer.
        total_steps: how many steps the run will have.
        config: the hyperparameters in use; `block_size`, `block_wise`, `stochastic_rounding` and `stable_emb` matter.
        params: the parameters; needed under `stable_emb` to find the embeddings.  Of several members, if the state is.
        embedding: as for ``automagic_8bit``.

    Returns:
        The state in the form for this step.

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
    if config.stable_emb and params is None:
        raise ValueError("stable_emb keeps embeddings in 32 bits: params are needed to find them")

    def quantized(state: ScaleByCameampState, params: Any) -> ScaleByCameampState:
        if np.ndim(pure(state.step)) > 0:
            # Marks and sizes depend on the member's own shapes.
            members: ScaleByCameampState = jax.vmap(quantized)(state, params)
            return members
        stays = [False] * len(flatten_like(state.age, state.age))
        if config.stable_emb:
            embeddings = unflatten_like(pure(params), resolve_mark(embedding, params, "embedding"))
            # The tree of marks may have leaves that the state lacks, since a mask may have taken them out.
            stays = resolve_mark(embeddings, state.age, "embedding")
        writer = Writer(pure(state.step), config.stochastic_rounding)
        # An nnx.Optimizer holds arrays in Variables, so the new absmax needs one too.
        holders = [x for x in jax.tree.leaves(state.age, is_leaf=is_variable) if is_variable(x)]
        hold: Callable[[Any], Any] = holders[0].replace if holders else lambda array: array

        def one(stored: Any, stay: bool, name: str) -> Any:
            if isinstance(stored, RowColumn):
                return with_long_one(stored, stay, name)
            value = pure(stored)
            return (
                stored
                if stay or not isinstance(value, jax.Array) or not 0 < value.size >= size
                else coded(stored, name)
            )

        def with_long_one(moment: RowColumn, stay: bool, name: str) -> RowColumn:
            row, column = (None if x is None else pure(x) for x in moment)
            if stay or not (isinstance(row, jax.Array) and isinstance(column, jax.Array)):
                return moment
            long = long_statistic(row.size, column.size)
            if long is None or not 0 < row.size * column.size >= size:
                return moment
            field = "row" if long == "_row" else "column"
            return moment._replace(**{field: coded(getattr(moment, field), name)})

        def coded(stored: Any, name: str) -> QuantizedArray:
            value = pure(stored)
            signed = name not in COMPANDED
            like = zeros(value.shape, signed, config.absmax_block_size)
            new: Any = (writer.signed if signed else writer.nonnegative)(value, like, SLOTS[name])
            codes = refilled(stored, new.codes) if is_container(stored) else new.codes
            return QuantizedArray(codes, hold(new.absmax), new.signed, new.block_size)

        trees = {}
        for name in SLOTS:
            leaves, structure = jax.tree.flatten(getattr(state, name), is_leaf=is_stored)
            if leaves:
                new = [one(leaf, stay, name) for leaf, stay in zip(leaves, stays, strict=True)]
                trees[name] = jax.tree.unflatten(structure, new)
        return state._replace(**trees)

    return map_states(lambda state: quantized(state, params if config.stable_emb else None), opt_state)
