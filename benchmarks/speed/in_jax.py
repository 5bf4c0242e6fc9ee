"""One case in JAX: one jitted step with donated parameters and states."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contestants.in_jax import drawn, optimizer
from benchmarks.gpu.measuring import failure
from benchmarks.speed.cases import Case
from benchmarks.speed.turns import in_turn

WARM_UP = 1


class Arrays:
    """The parameters, which all contestants step one after the other, and their gradients."""

    def __init__(self, case: Case) -> None:
        self.params = drawn(0, case.shapes, 0.02)
        self.grads = drawn(1, case.shapes, 1e-3)


class Entered:
    """An optimizer, compiled and stepped a few times."""

    def __init__(self, name: str, arrays: Arrays, lora: bool) -> None:
        self.arrays = arrays
        made = optimizer(name, lora)
        # The step consumes what it is given: no two leaves may share a buffer.
        self.state = jax.tree.map(jnp.copy, made.init(arrays.params))
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        started = time.perf_counter()
        lowered = jax.jit(made.step, donate_argnums=(0, 1)).lower(arrays.params, self.state, arrays.grads)
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        memory = self.compiled.memory_analysis()
        self.peak_bytes = None if memory is None else int(memory.temp_size_in_bytes)
        self.run(WARM_UP)

    def run(self, steps: int) -> float:
        """Seconds of some steps, waited for."""
        jax.block_until_ready((self.arrays.params, self.state))
        started = time.perf_counter()
        for _ in range(steps):
            self.arrays.params, self.state = self.compiled(self.arrays.params, self.state, self.arrays.grads)
        jax.block_until_ready((self.arrays.params, self.state))
        return time.perf_counter() - started


def measure(case: Case, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each name."""
    arrays = Arrays(case)
    entered: dict[str, Entered] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            entered[name] = Entered(name, arrays, case.adapters)
        except Exception as error:
            rows[name] = failure(error)
    found = in_turn({name: each.run for name, each in entered.items()}, case.seconds)
    for name, each in entered.items():
        rows[name] = found[name] | {
            "compile_seconds": each.compile_seconds,
            "state_bytes": each.state_bytes,
            "peak_bytes": each.peak_bytes,
        }
    if not all(bool(jnp.isfinite(value).all()) for value in arrays.params):
        raise FloatingPointError("parameters are not finite")
    return [{"name": name, **rows[name]} for name in names]
