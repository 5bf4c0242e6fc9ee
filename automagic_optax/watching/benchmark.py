"""`benchmark_optimizer`: times a jitted update without changing parameters or state."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from automagic_optax.arrays.containers import is_nnx
from automagic_optax.cameamp.memory_report import bytes_of

WARM_UP_STEPS = 3
"""Updates that are not timed: they load the program and fill the allocator's cache."""


def benchmark_optimizer(params: Any, tx: Any, num_steps: int = 10) -> dict[str, Any]:
    """Times jitted updates, ``tx.update`` and ``optax.apply_updates``, on synthetic gradients.

    It works on copies of parameters and state, which the updates overwrite like a training step that donates its
    arguments.  So the memory for a second copy is needed.

    Args:
        params: a tree of arrays, or an ``nnx`` model.
        tx: any optax transformation; for a model its ``nnx.Optimizer``, from whose state the updates go on (the
            overhead of ``nnx`` itself is not measured).
        num_steps: how many updates are timed, at least 1, after three that are not.  Each waits for all its results.

    Returns:
        ``"mean_ms"``, ``"median_ms"``, ``"min_ms"`` per update; ``"compile_ms"``; ``"num_steps"``; ``"parameters"``,
        the number of elements; ``"state_bytes"`` of the whole optimizer state; ``"peak_memory_bytes"``, what the
        compiled update holds at its peak (arguments, results and temporaries), or None where the backend does not tell.

    Raises:
        ValueError: `num_steps` below 1; a model without its ``nnx.Optimizer``; no parameters.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps!r} is not valid; valid: an integer ≥ 1")
    tx, params, state = _copies(params, tx)
    elements = sum(int(x.size) for x in jax.tree.leaves(params))
    if elements == 0:
        raise ValueError("there are no parameters to update")
    gradients = _gradients(params)

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted, seconds, compile_seconds, structure = jax.jit(step, donate_argnums=(0, 1)), [], 0.0, None
    for i in range(WARM_UP_STEPS + num_steps):
        if structure != _structure(params, state):
            # It compiles again where the first update gives the state another structure.
            structure, started = _structure(params, state), time.perf_counter()
            compiled = jitted.lower(params, state, gradients).compile()
            compile_seconds += time.perf_counter() - started
        started = time.perf_counter()
        params, state = jax.block_until_ready(compiled(params, state, gradients))
        if i >= WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    return {
        "mean_ms": 1e3 * statistics.fmean(seconds),
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "compile_ms": 1e3 * compile_seconds,
        "num_steps": num_steps,
        "parameters": elements,
        "state_bytes": bytes_of(state),
        "peak_memory_bytes": _peak(compiled.memory_analysis()),
    }


def _copies(params: Any, tx: Any) -> tuple[Any, Any, Any]:
    """The transformation, and copies of its parameters and its state."""
    if is_nnx(params, "Module"):
        if not is_nnx(tx, "Optimizer"):
            raise ValueError(f"an nnx model needs its nnx.Optimizer, not {type(tx).__name__}")
        from flax import nnx

        # nnx.Optimizer.update passes the same on.
        as_pure = getattr(nnx, "as_pure", None) or nnx.pure
        return tx.tx, _copy(as_pure(nnx.state(params, tx.wrt))), _copy(as_pure(tx.opt_state))
    params = _copy(params)
    return tx, params, _copy(tx.init(params))


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _gradients(params: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [1e-2 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(structure, made))


def _structure(*trees: Any) -> Any:
    leaves, structure = jax.tree.flatten(trees)
    return structure, [(x.shape, x.dtype, x.weak_type) for x in leaves]


def _peak(memory: Any) -> int | None:
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(held + memory.temp_size_in_bytes)
