"""What an update costs in JAX, ours beside other optimizers: a part of ``make gpu``.

One jitted step with donated parameters and states.  Several programs are compiled at a time, so that the part fits
into its minutes: their seconds are a little more than alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import optax

from automagic_optax import automagic_8bit, finish_warmup, quantize_state
from benchmarks.gpu import measuring
from benchmarks.gpu.measuring import Clock, Record

STAGES_OFF: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
COMPILED_TOGETHER = 8
WARM_UP = 3
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Entry:
    """One optimizer with its parameters and states, ready to be compiled."""

    def __init__(self, name: str, shapes: measuring.Shapes, lora: bool) -> None:
        self.name = name
        self.params = drawn(0, shapes, 0.02)
        self.init, self.step = optimizer(name, lora)
        self.state = self.init(self.params)
        if name.startswith("ours"):
            self.state = finish_warmup(self.state)
        # The step consumes what it is given: no two leaves may share a buffer.
        self.state = jax.tree.map(jnp.copy, self.state)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))

    def lowered(self, grads: Any) -> Any:
        """The program before it is compiled."""
        return jax.jit(self.step, donate_argnums=(0, 1)).lower(self.params, self.state, grads)

    def run(self, compiled: Any, grads: Any, steps: int) -> float:
        """Seconds of some steps, waited for."""
        jax.block_until_ready((self.params, self.state))
        started = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = compiled(self.params, self.state, grads)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - started


def optimizer(name: str, lora: bool) -> tuple[Callable[[Any], Any], Step]:
    """`init` and a step (params, state, grads) → (params, state)."""
    if name == "flashoptim-jax":
        flash = import_module("flashoptim_jax").flash_adamw(learning_rate=1e-4, master_weight_bits=None)
        return flash.init, lambda params, state, grads: flash.step(params, state, grads)
    ours = functools.partial(automagic_8bit, 1e-4, warmup_steps=1, lora=lambda path, leaf: lora)
    factories: dict[str, Callable[[], Any]] = {
        "optax.adamw": lambda: optax.adamw(1e-4),
        "optax.adamw, again": lambda: optax.adamw(1e-4),
        "quantize_state(adamw)": lambda: quantize_state(optax.adamw(1e-4)),
        "ours, balanced": ours,
        "ours, balanced, stages off": lambda: ours(**STAGES_OFF),
        "ours, memory_optimized": lambda: ours(profile="memory_optimized"),
        "ours, quality_optimized": lambda: ours(profile="quality_optimized"),
    }
    tx = factories[name]()

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


NAMES = (
    "optax.adamw",
    "ours, balanced",
    "ours, balanced, stages off",
    "ours, memory_optimized",
    "ours, quality_optimized",
    "quantize_state(adamw)",
    "flashoptim-jax",
    "optax.adamw, again",
)


def drawn(seed: int, shapes: measuring.Shapes, scale: float) -> list[jax.Array]:
    """Normally distributed arrays."""
    draw = jax.jit(lambda key, shape: scale * jax.random.normal(key, shape, jnp.float32), static_argnums=1)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def measure(entry: Entry, compiled: Any, grads: Any, rounds: int) -> dict[str, Any]:
    """One compiled optimizer."""
    entry.run(compiled, grads, WARM_UP)
    inner = measuring.steps_in_a_round(min(entry.run(compiled, grads, 1) for _ in range(2)))
    found = measuring.spread([1e3 * entry.run(compiled, grads, inner) / inner for _ in range(rounds)])
    parameters = sum(x.size for x in entry.params)
    memory = compiled.memory_analysis()
    if not all(bool(jnp.isfinite(x).all()) for x in entry.params):
        found["error"] = "parameters are not finite"
    return {
        "parameters": parameters,
        **found,
        "steps_in_a_round": inner,
        **measuring.per_parameter(found["ms"], parameters, entry.state_bytes),
        "state_bytes": entry.state_bytes,
        "peak_bytes": None if memory is None else int(memory.temp_size_in_bytes),
    }


def measure_case(case: str, shapes: measuring.Shapes, record: Record, rounds: int) -> None:
    """All optimizers on one set of arrays."""
    grads = drawn(1, shapes, 1e-3)
    entries: dict[str, Entry] = {}
    lowered: dict[str, Any] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        try:
            entries[name] = Entry(name, shapes, measuring.is_adapters(case))
            lowered[name] = entries[name].lowered(grads)
        except Exception as error:
            failed[name] = measuring.failure(error)

    def compiled_in(name: str) -> tuple[Any, float]:
        started = time.perf_counter()
        return lowered[name].compile(), time.perf_counter() - started

    with ThreadPoolExecutor(COMPILED_TOGETHER) as pool:
        compiling = {name: pool.submit(compiled_in, name) for name in lowered}
    for name in NAMES:
        row: dict[str, Any] = {"framework": "JAX", "case": case, "name": name}
        try:
            if name in failed:
                row |= failed[name]
            else:
                compiled, seconds = compiling[name].result()
                row |= measure(entries.pop(name), compiled, grads, rounds) | {"compile_seconds": seconds}
        except Exception as error:
            row |= measuring.failure(error)
        record.add("rows", row)


def main() -> None:
    """Every case."""
    options = measuring.options(__doc__)
    record, clock = Record(options.out), Clock(options.seconds)
    record.put("backend", str(jax.devices()))
    for case, shapes in (measuring.SMALL_CASES if options.small else measuring.CASES).items():
        if clock.is_over():
            record.put("unfinished", f"{case} and what comes after")
            return
        try:
            measure_case(case, shapes, record, 2 if options.small else measuring.ROUNDS)
        except Exception as error:
            record.add("rows", {"framework": "JAX", "case": case, "name": "all"} | measuring.failure(error))
        jax.clear_caches()


if __name__ == "__main__":
    main()
