"""`requantized`: continues a run with other bits, other blocks or another `factored`.

`docs/algorithm.md`, section 10.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_core import Config, Slot
from automagic_core.arrays.parts import in_parts, what_is_lost
from automagic_core.arrays.state_forms import WARM_UP_ONLY
from automagic_core.config.constants import SQUARE_FLOOR
from automagic_core.moving.notes import Notes
from automagic_optax.arrays.containers import held_like, pure
from automagic_optax.cameamp.find_states import only_state, refuse_several
from automagic_optax.cameamp.states import ArrayState, Search
from automagic_optax.cameamp.verbose import LOGGER
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.codec.stored import (
    RowColumn,
    Stored,
    StoredMoment,
    Writer,
    moment_from,
    read_root,
    read_signed,
    tensors_of,
)
from automagic_optax.moving.edge_histories import ESTIMATED, EdgeHistory, edge_histories, estimated, v_hat_of
from automagic_optax.moving.filled_chain import Template, arrays_of, own_edges, take_over_other_states

f32 = np.float32
_ROW_STATES = ("lr_mask", "spatial_variance")


def requantized(
    opt_state: Any, params: Any, tx: optax.GradientTransformation, *, config: Config | None = None
) -> tuple[Any, list[str]]:
    """The state of a run of this optimizer in the form in which `tx` stores it.

    The number of bits, the block size and `factored` may differ.  Single values become row and column means; back from
    these they are a product, an approximation.  A state that keeps its form keeps every bit.  A state that goes to 8
    bits is rounded with the random bits of the run's last step.  Step, the search, δ, ages and counters stay, and so do
    states of stages and of other transformations in the chain if both sides have them.  An `edge_history` that the run
    lacks is estimated from v̂.  Both sides must have the same `betas`.  Call it outside ``jax.jit``.

    Args:
        opt_state: state of ``automagic_8bit``, alone or in a chain.
        params: the parameters.
        tx: ``automagic_8bit(...)``, alone or in a chain, with the same layout.
        config: the hyperparameters that `tx` was made with; `betas` and `stochastic_rounding` matter.

    Returns:
        The state, and what changed its form, was dropped or begins anew, one sentence each; also logged by
        ``automagic_optax``.  In ``nnx.Optimizer`` put it in place by
        ``nnx.update(optimizer.opt_state, nnx.state(state))``.

    Raises:
        ValueError: there is not exactly one state of this optimizer on each side, `opt_state` is of several members
            (``jax.vmap``), or arrays differ.

    Example:
        >>> opt_state, told = requantized(state_in_32_bits, params, automagic_8bit(1e-4))
    """
    config = Config() if config is None else config
    notes = Notes()
    template = Template(params, tx)
    source = pure(only_state(opt_state, "opt_state"))
    refuse_several(source.step)
    arrays = arrays_of(source, template.tree, "opt_state")
    for name, old, like in zip(template.names, arrays, template.arrays, strict=True):
        _check_rows(old, like, name)
    writer = Writer(source.step, config.stochastic_rounding)
    new = [
        _requantized(old, like, writer, config, name, notes)
        for name, old, like in zip(template.names, arrays, template.arrays, strict=True)
    ]
    known = edge_histories(template.tree, own_edges(pure(opt_state)))
    histories = [
        _history(old, like, array, config, name, notes)
        for old, like, array, name in zip(known, template.histories, arrays, template.names, strict=True)
    ]
    filled = template.filled(source.step, Search.of(source), new, histories, source.learning_rate)
    whole = take_over_other_states(filled, opt_state, notes)
    return held_like(template.fresh, whole), notes.tell(LOGGER)


def _check_rows(old: ArrayState, like: ArrayState, name: str) -> None:
    """Raises a ValueError if the rows are other axes, because of another layout or another mark."""
    for field in (*_ROW_STATES, "walk", "exp_avg_sq", "exp_avg_res"):
        ours, theirs = (_row_shape(getattr(array, field), field) for array in (like, old))
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(f"opt_state has {field} with rows of shape {theirs} for {name}; valid: {ours}")


def _row_shape(value: Any, field: str) -> tuple[int, ...] | None:
    if isinstance(value, RowColumn):
        return None if value.row is None else value.row.shape
    return value.shape if field in (*_ROW_STATES, "walk") and value is not None else None


def _requantized(
    old: ArrayState, like: ArrayState, writer: Writer, config: Config, name: str, notes: Notes
) -> ArrayState:
    _note_bits(old.exp_avg, like.exp_avg, name, notes)
    new = old._replace(
        exp_avg=_signed(old.exp_avg, like.exp_avg, writer, Slot.exp_avg),
        exp_avg_sq=_moment(old.exp_avg_sq, like.exp_avg_sq, old.exp_avg.shape, writer, Slot.exp_avg_sq, name, notes),
        exp_avg_res=_moment(
            old.exp_avg_res, like.exp_avg_res, old.exp_avg.shape, writer, Slot.exp_avg_res, name, notes
        ),
    )
    if like.background_scale is not None and old.background_scale is None and int(old.age) > 0:
        v_hat = v_hat_of(old.exp_avg_sq, config.betas[1], int(old.age))
        new = new._replace(background_scale=jnp.mean(jnp.sqrt(jnp.maximum(v_hat, f32(SQUARE_FLOOR)))))
    for field in (*_ROW_STATES, "s", "walk", "background_scale"):
        was, wanted = getattr(new, field), getattr(like, field)
        if (was is None) == (wanted is None):
            continue
        if was is not None:
            notes.lost(f"{field} has no use with this tx: dropped", name)
        elif field in WARM_UP_ONLY:
            notes.changed(f"{field} stays away, as after finish_warmup", name)
            continue
        else:
            notes.changed(f"{field} begins at zero, as in a new run", name)
        new = new._replace(**{field: wanted})
    if new.s is not None and like.s is not None:
        new = new._replace(s=_signed(new.s, like.s, writer, Slot.s))
    return new


def _history(
    old: EdgeHistory, like: EdgeHistory, array: ArrayState, config: Config, name: str, notes: Notes
) -> EdgeHistory:
    if like.history is None:
        return like
    if old.history is not None and old.history.shape == like.history.shape:
        return old
    age = int(array.age)
    if age == 0:
        return like
    notes.changed(ESTIMATED, name)
    return estimated(v_hat_of(array.exp_avg_sq, config.betas[1], age), like.history, age)


def _signed(old: Stored, like: Stored, writer: Writer, slot: Slot) -> Stored:
    return old if _same_form(old, like) else writer.signed(read_signed(old), like, slot)


def _moment(
    old: StoredMoment, like: StoredMoment, shape: tuple[int, ...], writer: Writer, slot: Slot, name: str, notes: Notes
) -> StoredMoment:
    if _same_form(old, like):
        return old
    held, wanted = tensors_of(old, slot.name), tensors_of(like, slot.name)
    if (loss := what_is_lost(slot.name, held, wanted)) is not None:
        notes.lost(loss, name)
    shapes = {part: x.shape for part, x in wanted.items()}
    values = in_parts({part: read_root(x) for part, x in held.items()}, slot.name, shapes, jnp.ones(shape, jnp.float32))
    return moment_from(
        {
            part: held[part] if part in held and _same_form(held[part], x) else writer.root(values[part], x, slot)
            for part, x in wanted.items()
        },
        slot.name,
    )


def _same_form(old: Any, like: Any) -> bool:
    if isinstance(old, RowColumn) and isinstance(like, RowColumn):
        return all(_same_form(x, y) for x, y in zip(old, like, strict=True))
    if isinstance(old, QuantizedArray) and isinstance(like, QuantizedArray):
        return old.block_size == like.block_size
    return type(old) is type(like) or (isinstance(old, jax.Array) and isinstance(like, jax.Array))


def _note_bits(old: Stored, like: Stored, name: str, notes: Notes) -> None:
    if _same_form(old, like):
        return
    if not isinstance(like, QuantizedArray):
        notes.changed("8-bit states go on in 32 bits as they read; what rounding took stays lost", name)
    elif not isinstance(old, QuantizedArray):
        notes.changed("32-bit states are rounded to 8 bits", name)
    else:
        notes.changed(f"8-bit states are rounded again to blocks of {like.block_size or 'the whole array'}", name)
