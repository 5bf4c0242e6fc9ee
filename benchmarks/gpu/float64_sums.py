"""What float64 sums cost in JAX: an update as it is and with float32 sums, and the sums alone; part of ``make gpu``."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from automagic_optax.arrays import means
from benchmarks.gpu import jax_speed, measuring
from benchmarks.gpu.measuring import Clock, Record

SWITCH = "WITH_FLOAT64"
"""The backends that sum in float64."""


def update(shapes: measuring.Shapes, lora: bool, name: str, rounds: int) -> dict[str, Any]:
    """One optimizer's update with the sums as they now are."""
    jax.clear_caches()
    grads = jax_speed.drawn(1, shapes, 1e-3)
    entry = jax_speed.Entry(name, shapes, lora)
    compiled = entry.lowered(grads).compile()
    wide = (compiled.as_text() or "").count("f64[")
    return jax_speed.measure(entry, compiled, grads, rounds) | {"f64_in_the_program": wide}


def sums(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Over all elements, over rows and over columns, in float64 and in float32."""
    accurate_sum = means.accurate_sum
    x = jax.block_until_ready(jax.random.normal(jax.random.key(0), shape, jnp.float32))
    found: dict[str, Any] = {}
    for label, axes in (("all", None), ("rows", (0,)), ("columns", (1,))):
        for kind, function in (
            ("float64", lambda x, axes=axes: accurate_sum(x, axes)),
            ("float32", lambda x, axes=axes: jnp.sum(x, axes)),
        ):
            compiled = jax.jit(function).lower(x).compile()
            taken = []
            for _ in range(3 + rounds):
                started = time.perf_counter()
                for _ in range(10):
                    y = compiled(x)
                jax.block_until_ready(y)
                taken.append(1e2 * (time.perf_counter() - started))
            found[f"{label}, {kind}"] = measuring.spread(taken[3:])
    return found


def main() -> None:
    """All of it."""
    options = measuring.options(__doc__)
    record, clock = Record(options.out), Clock(options.seconds)
    rounds = 2 if options.small else measuring.ROUNDS
    record.tried("sums alone", lambda: sums((256, 256) if options.small else (8192, 8192), rounds))
    for case, shapes in (measuring.SMALL_CASES if options.small else measuring.CASES).items():
        if not options.small and case not in ("64 M", "200 adapters"):
            continue
        lora = measuring.is_adapters(case)
        for name in ("ours, balanced", "ours, balanced, stages on"):
            for kind in ("float64", "float32"):
                if clock.is_over():
                    record.put("unfinished", f"{case}, {name}")
                    return
                row: dict[str, Any] = {"case": case, "name": name, "sums": kind}
                switched = {"float64": getattr(means, SWITCH), "float32": ()}[kind]
                try:
                    with mock.patch.object(means, SWITCH, switched):
                        row |= update(shapes, lora, name, rounds)
                except Exception as error:
                    row |= measuring.failure(error)
                record.add("rows", row)


if __name__ == "__main__":
    main()
