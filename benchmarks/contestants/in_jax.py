"""Optimizers in JAX, as functions that can be jitted."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from automagic_optax import automagic_8bit, finish_warmup, quantize_state
from benchmarks.contestants import ONLY_CUDA, OURS, SEARCHING

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Optimizer(NamedTuple):
    """`init`, parameters → state, and a step (parameters, state, gradients) → (parameters, state)."""

    init: Callable[[Any], Any]
    step: Step


def of_optax(tx: Any) -> Optimizer:
    """A transformation whose updates are added."""

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Optimizer(tx.init, step)


def ours(name: str, lora: bool) -> Optimizer:
    """An entry of `OURS`.

    Args:
        lora: whether every array counts as an adapter.
    """
    searching = name in SEARCHING
    fields = {"warmup_steps": 100_000 if searching else 1, **OURS[name]}
    tx = automagic_8bit(1e-4, lora=lambda path, leaf: lora, **fields)
    optimizer = of_optax(tx)
    return optimizer if searching else optimizer._replace(init=lambda params: finish_warmup(tx.init(params)))


def _flashoptim() -> Optimizer:
    flash = import_module("flashoptim_jax").flash_adamw(learning_rate=1e-4, master_weight_bits=None)
    return Optimizer(flash.init, lambda params, state, grads: flash.step(params, state, grads))


PEERS: dict[str, Callable[[], Optimizer]] = {
    "optax.adamw": lambda: of_optax(optax.adamw(1e-4)),
    "optax.adafactor": lambda: of_optax(optax.adafactor(1e-4)),
    "flashoptim-jax": _flashoptim,
}
NOT_ON_A_CPU = {"flashoptim-jax": ONLY_CUDA}
QUANTIZED = "quantize_state(adamw)"


def optimizer(name: str, lora: bool) -> Optimizer:
    """A peer, or, after ``ours, `` or bare, `QUANTIZED` or an entry of `OURS`."""
    name = name.removeprefix("ours, ")
    if name == QUANTIZED:
        return of_optax(quantize_state(optax.adamw(1e-4)))
    return PEERS[name]() if name in PEERS else ours(name, lora)


def drawn(seed: int, shapes: list[tuple[int, ...]], scale: float) -> list[jax.Array]:
    """Normally distributed float32 arrays."""
    draw = jax.jit(lambda key, shape: scale * jax.random.normal(key, shape, jnp.float32), static_argnums=1)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]
