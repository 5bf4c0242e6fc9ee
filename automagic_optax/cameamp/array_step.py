"""The update of one array (`docs/algorithm.md`, section 5)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from automagic_core import MAX_STEP, StatePlan
from automagic_optax.arrays.in_chunks import chunk_count, chunk_of_array, in_chunks, runs_in_chunks
from automagic_optax.arrays.usable import is_usable
from automagic_optax.cameamp import equations
from automagic_optax.cameamp.known_before import Known, Shared, constant_at_zero, known, look
from automagic_optax.cameamp.learning_rate import Evidence
from automagic_optax.cameamp.one_pass import Pass, elements, elementwise_states, finished, held
from automagic_optax.cameamp.states import ArrayState
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.codec.random_bits import Chunk
from automagic_optax.codec.stored import Statistics


class ArrayStep(NamedTuple):
    """The result of the step of one array, or of a batch with a leading axis.

    Attributes:
        update: float32, to be added to the parameter.
        state: the array's new states.
        evidence: what the array says to the search.
        skipped: int32, how many arrays were skipped so far in this call.
    """

    update: jax.Array
    state: ArrayState
    evidence: Evidence
    skipped: jax.Array


def step_array(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, skipped: Any
) -> ArrayStep:
    """The step of one array; if its gradient is unusable, the array is skipped (section 6.2).

    A skipped array keeps its states, except that `skipped_steps` grows by one.  Its update is −0.0, which leaves even a
    parameter of −0.0 as it is.  Each array gets the count of skipped arrays from the one before.  So on a CPU each
    waits for the one before, and only one array's float32 values are in memory at a time.

    Args:
        g, w: gradient and parameter, of one shape and any floating dtype.
        old: the array's states.
        plan: says in which form they are.
        decayed: whether weight decay applies to the array.
        shared: what all arrays share.
        skipped: how many arrays were skipped so far in this call.
    """
    plan = held(plan, old, shared.config)
    take = functools.partial(taken_whole, plan=plan, decayed=decayed, shared=shared)
    chunk = chunk_of_array(g)
    cut = None if chunk is None else _cut(plan, elementwise_states(old, plan), chunk)
    if cut is None and not runs_in_chunks(g):
        return with_skips(is_usable(g, shared.gradient_limit), take(g, w, old, skipped), old)
    if cut is not None:
        return _step_in_chunks(g, w, old, plan, decayed, shared, cut, skipped)
    # The branch is a border: what one array needs is not computed before the last one is done.
    taken: ArrayStep = lax.cond(
        is_usable(g, shared.gradient_limit),
        take,
        lambda *operands: with_skips(jnp.zeros([], bool), _zeros(take, *operands), operands[2]),
        *(g, w, old, skipped),
    )
    return taken


def taken_whole(
    g: jax.Array, w: jax.Array, old: ArrayState, skipped: Any, plan: StatePlan, decayed: bool, shared: Shared
) -> ArrayStep:
    """The step of a whole array that is not skipped."""
    states, g = elementwise_states(old, plan), constant_at_zero(g, old.exp_avg_sq)
    now = known(old, look(g, states, plan), plan, shared)
    found = elements(g, w, states, now, plan, decayed, shared)
    return ArrayStep(found.update, *finished(found, old, now, plan, shared), skipped)


def _zeros(step: Any, *operands: Any) -> ArrayStep:
    zeros: ArrayStep = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, *operands))
    return ArrayStep(*zeros[:3], operands[3])


def with_skips(usable: jax.Array, taken: ArrayStep, old: ArrayState) -> ArrayStep:
    """The step, or what a skipped array keeps (section 6.2)."""

    def chosen(x: Any, y: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(usable, a, b), x, y)

    kept = old._replace(skipped_steps=jnp.minimum(old.skipped_steps, MAX_STEP - 1) + 1)
    nothing = jax.tree.map(jnp.zeros_like, taken.evidence)
    return ArrayStep(
        jnp.where(usable, taken.update, jnp.float32(-0.0)),
        chosen(taken.state, kept),
        chosen(taken.evidence, nothing),
        taken.skipped + jnp.where(usable, 0, 1),
    )


class _Cut(NamedTuple):
    """How an array is cut: it is seen as a matrix of `length` rows, and a chunk is some of them.

    Attributes:
        chunks: how many.
        plan: of one chunk.
        length: of the matrix.
    """

    chunks: int
    plan: StatePlan
    length: int


def _cut(plan: StatePlan, states: dict[str, Any], chunk: int) -> _Cut | None:
    """How the array is cut into chunks of about so many elements; None where it is computed as a whole.

    Chunks hold whole blocks of the states as they are: `progressive_quantization` stores them otherwise than the plan.
    """
    blocks = [x.block_size or plan.size for x in states.values() if isinstance(x, QuantizedArray)]
    if plan.block_size is None or not plan.shape or plan.size == 0:
        return None
    last = plan.row_axis not in (None, 0)
    if last and plan.row_axis != len(plan.shape) - 1:
        return None
    if plan.row_axis is None:
        width = math.gcd(plan.size, 2**12)
    else:
        width = plan.shape[-1] if last else plan.size // plan.shape[0]
    length = plan.size // width
    count = chunk_count(length, width, math.lcm(*blocks), chunk)
    if count == 1:
        return None
    part = (length // count, width)
    row_axis = None if plan.row_axis is None else int(last)
    return _Cut(
        count,
        dataclasses.replace(
            plan,
            shape=part,
            row_axis=row_axis,
            column_axes=() if row_axis is None else (1 - row_axis,),
            row_shape=(1, width) if last else (part[0], 1),
            column_shape=(part[0], 1) if last else (1, width),
        ),
        length,
    )


def _step_in_chunks(
    g: jax.Array, w: jax.Array, old: ArrayState, plan: StatePlan, decayed: bool, shared: Shared, cut: _Cut, skipped: Any
) -> ArrayStep:
    """`step_array` of a large array: its sums of squares first, then one pass over its elements."""
    part = cut.plan
    across = part.row_axis == 1  # a row of the array is a column of the matrix: its sums are those of all chunks
    whole = (cut.length, part.shape[1])

    def matrix(x: jax.Array) -> jax.Array:
        return x.reshape(whole)

    gradient = matrix(constant_at_zero(g, old.exp_avg_sq))
    states = {name: _rows_of(x, cut) for name, x in elementwise_states(old, plan).items()}

    def first(_: Any, chunk: Any) -> Any:
        g, read = chunk
        seen = look(g, read, part)
        inside = "column" if across else "row"
        spoilt = (~is_usable(g, shared.gradient_limit)).astype(jnp.int32)
        return getattr(seen, inside), (spoilt, seen._replace(**{inside: None}))

    into = jnp.zeros((cut.length, 1), jnp.float32) if part.factored_sq else None
    read = {name: x for name, x in states.items() if name == "exp_avg_sq"}
    inside, (spoilt, seen) = in_chunks(first, cut.chunks, (gradient, read), into)
    usable = spoilt == 0
    if part.factored_sq:
        row, column = (seen.row, inside) if across else (inside, seen.column)
        seen = seen._replace(row=row.reshape(plan.row_shape), column=column.reshape(plan.column_shape))
    now = known(old, seen, plan, shared)

    flat = _as_matrix(now, plan, part, cut.length)
    along = {name: x for name, x in flat.items() if x.shape[0] == cut.length}
    size = part.size

    def step(index: Any, chunk: Any) -> tuple[Any, Any]:
        g, w, states, inside = chunk
        writer = shared.writer._replace(chunk=Chunk(index * size, plan.size))
        here = _from_matrix(now, {**flat, **inside})
        found = elements(g, w, states, here, part, decayed, shared._replace(writer=writer))
        update = jnp.where(usable, found.update, jnp.float32(-0.0))
        kept = jax.tree.map(lambda x, y: jnp.where(usable, x, y), found.states, states)
        local, summed = (found.columns, found.rows) if across else (found.rows, found.columns)
        spread: dict[str, Any] = {} if found.spread is None else {"spread": found.spread}
        sums: dict[str, Any] = {"sums": summed, "totals": found.totals}
        return (update, kept, local if across else {**local, **spread}), {**sums, **spread} if across else sums

    def add(index: Any, total: Any, more: Any) -> Any:
        before = (index * part.shape[0]).astype(jnp.float32)
        added: dict[str, Any] = {name: jax.tree.map(jnp.add, total[name], more[name]) for name in ("sums", "totals")}
        if "spread" in total:
            added["spread"] = equations.joined(total["spread"], before, more["spread"], part.shape[0])
        return added

    arrays = (gradient, matrix(w), states, along)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0] // cut.chunks, *x.shape[1:]), x.dtype), arrays)
    (_, _, local), _ = jax.eval_shape(step, jnp.int32(0), one)
    blank = jax.tree.map(lambda x: jnp.zeros((x.shape[0] * cut.chunks, *x.shape[1:]), x.dtype), local)
    start = gradient if gradient.dtype == jnp.float32 else jnp.zeros(whole, jnp.float32)
    (update, new, local), summed = in_chunks(step, cut.chunks, arrays, (start, states, blank), add)
    rows, columns = (summed["sums"], local) if across else (local, summed["sums"])
    spread = summed.get("spread") if across else local.get("spread")
    found = Pass(
        update.reshape(plan.shape),
        {name: _shaped_like(x, getattr(old, name)) for name, x in new.items()},
        {name: x.reshape(plan.row_shape) for name, x in rows.items() if name != "spread"},
        {name: x.reshape(plan.column_shape) for name, x in columns.items() if name != "spread"},
        summed["totals"],
        None if spread is None else jax.tree.map(lambda x: x.reshape(plan.row_shape), spread),
    )
    # What the pass wrote was chosen there.
    new, evidence = finished(found, old, now, plan, shared)
    rest: dict[str, Any] = dict.fromkeys(states)
    others = ArrayStep(found.update[:0], new._replace(**rest), evidence, skipped)
    taken = with_skips(usable, others, old._replace(**rest))
    return taken._replace(update=found.update, state=taken.state._replace(**found.states))


def _as_matrix(now: Known, plan: StatePlan, part: StatePlan, length: int) -> dict[str, jax.Array]:
    """The row and column statistics of what is known, as those of the matrix, by names."""
    across = part.row_axis == 1
    row_shape = (1, part.shape[1]) if across else (length, 1)
    column_shape = (length, 1) if across else (1, part.shape[1])
    found: dict[str, jax.Array] = {}
    for name, pair in (("root", now.root), ("res", now.res)):
        for kind, x in () if pair is None else zip(("row", "column"), pair, strict=True):
            if x is not None:
                found[f"{name}.{kind}"] = x.reshape(row_shape if kind == "row" else column_shape)
    if now.rows.ndim:
        found["rows"] = now.rows.reshape(row_shape)
    return found


def _from_matrix(now: Known, found: dict[str, jax.Array]) -> Known:
    def pair(name: str, like: Statistics | None) -> Statistics | None:
        return None if like is None else Statistics(found.get(f"{name}.row"), found.get(f"{name}.column"))

    return now._replace(root=pair("root", now.root), res=pair("res", now.res), rows=found.get("rows", now.rows))


def _rows_of(x: Any, cut: _Cut) -> Any:
    """An elementwise state as that of the matrix."""
    width = cut.plan.shape[1]
    if not isinstance(x, QuantizedArray):
        return x.reshape(cut.length, -1)
    assert x.block_size is not None
    blocks = (cut.length, width // x.block_size) if width % x.block_size == 0 else (-1,)
    return dataclasses.replace(x, codes=x.codes.reshape(cut.length, width), absmax=x.absmax.reshape(blocks))


def _shaped_like(x: Any, like: Any) -> Any:
    return jax.tree.map(lambda a, b: a.reshape(b.shape), x, like)
