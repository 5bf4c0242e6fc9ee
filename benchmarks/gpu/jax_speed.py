"""What an update costs in JAX, ours beside other optimizers: a part of ``make gpu``.

One jitted step with donated parameters and states.  Several programs are compiled at a time, so that the part fits
into its minutes: their seconds are a little more than alone.  Nothing is measured while something compiles.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contestants.in_jax import drawn, optimizer
from benchmarks.gpu import measuring
from benchmarks.gpu.measuring import Clock, Record

WARM_UP = 3


class Entry:
    """One optimizer with its parameters and states, ready to be compiled."""

    def __init__(self, name: str, shapes: measuring.Shapes, lora: bool) -> None:
        self.name = name
        self.params = drawn(0, shapes, 0.02)
        self.optimizer = optimizer(name.removesuffix(", again"), lora)
        self.state = self.optimizer.init(self.params)
        # The step consumes what it is given: no two leaves may share a buffer.
        self.state = jax.tree.map(jnp.copy, self.state)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))

    def lowered(self, grads: Any) -> Any:
        """The program before it is compiled."""
        return jax.jit(self.optimizer.step, donate_argnums=(0, 1)).lower(self.params, self.state, grads)

    def run(self, compiled: Any, grads: Any, steps: int) -> float:
        """Seconds of some steps, waited for."""
        jax.block_until_ready((self.params, self.state))
        started = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = compiled(self.params, self.state, grads)
        jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - started


NAMES = (
    ("optax.adamw", "quantize_state(adamw)", "flashoptim-jax"),
    ("ours, balanced", "ours, memory_optimized", "ours, quality_optimized"),
    ("ours, balanced, stages on", "optax.adamw, again"),
)
"""What is compiled together and then measured: the slow ones come last, so that they keep no row from the others."""


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


def measure_some(names: Sequence[str], case: str, shapes: measuring.Shapes, record: Record, rounds: int) -> None:
    """Some optimizers on one set of arrays."""
    grads = drawn(1, shapes, 1e-3)
    entries: dict[str, Entry] = {}
    lowered: dict[str, Any] = {}
    failed: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            entries[name] = Entry(name, shapes, measuring.is_adapters(case))
            lowered[name] = entries[name].lowered(grads)
        except Exception as error:
            failed[name] = measuring.failure(error)

    def compiled_in(name: str) -> tuple[Any, float]:
        started = time.perf_counter()
        return lowered[name].compile(), time.perf_counter() - started

    with ThreadPoolExecutor(len(names)) as pool:
        compiling = {name: pool.submit(compiled_in, name) for name in lowered}
    for name in names:
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
    rounds = 2 if options.small else measuring.ROUNDS
    for case, shapes in (measuring.SMALL_CASES if options.small else measuring.CASES).items():
        for names in NAMES:
            if clock.is_over():
                record.put("unfinished", f"{case}, {names[0]} and what comes after")
                return
            try:
                measure_some(names, case, shapes, record, rounds)
            except Exception as error:
                for name in names:
                    record.add("rows", {"framework": "JAX", "case": case, "name": name} | measuring.failure(error))
        jax.clear_caches()


if __name__ == "__main__":
    main()
