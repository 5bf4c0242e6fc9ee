"""What an update costs on a CPU: ``python -m benchmarks.cpu_speed``

One jitted update (``tx.update`` and ``optax.apply_updates`` with donated buffers) of a transformer's 50 million
parameters, ours with 8-bit states against `optax.adamw` with 32-bit states.  All contestants take turns in one process.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from automagic_optax import QuantizedArray, automagic_8bit, finish_warmup
from benchmarks import results

LAYERS, WIDTH, VOCABULARY, CONTEXT = 3, 1024, 10_240, 1024
REFERENCE = "optax.adamw, 32-bit"


def shapes(layers: int = LAYERS, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """The arrays of a GPT-like model, kernels (in, out)."""
    tree: dict[str, tuple[int, ...]] = {"tokens": (VOCABULARY, width), "positions": (CONTEXT, width)}
    for layer in range(layers):
        for name, fan_in, fan_out in (
            ("query_key_value", width, 3 * width),
            ("attention_out", width, width),
            ("mlp_in", width, 4 * width),
            ("mlp_out", 4 * width, width),
        ):
            tree |= {f"{layer}.{name}.kernel": (fan_in, fan_out), f"{layer}.{name}.bias": (fan_out,)}
        for name in ("attention_norm", "mlp_norm"):
            tree |= {f"{layer}.{name}.scale": (width,), f"{layer}.{name}.bias": (width,)}
    return tree | {"final_norm.scale": (width,), "final_norm.bias": (width,)}


class Contestant:
    """One transformation with its own parameters and state, compiled, ready to step."""

    def __init__(self, name: str, tx: Any, like: dict[str, tuple[int, ...]], warm: bool = True) -> None:
        self.name = name
        self.params = normal_tree(jax.random.key(0), like, 0.02)
        self.state = tx.init(self.params)
        if not warm:
            self.state = finish_warmup(self.state)
        # What XLA would hold at its peak if it read every 8-bit state before it used one.
        self.float32_states = sum(4 * x.size for x in _quantized(self.state))
        self.state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        started = time.perf_counter()
        self.compiled = step.lower(self.params, self.state, self.params).compile()
        self.compile_seconds = time.perf_counter() - started
        memory = self.compiled.memory_analysis()
        assert memory is not None, "this backend does not tell what it holds"
        self.temporary_bytes = int(memory.temp_size_in_bytes)
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def step(self, gradients: Any) -> None:
        """One update, timed by the clock and in processor time, which neighbours on a shared machine disturb less."""
        started, processor_started = time.perf_counter(), time.process_time()
        self.params, self.state = jax.block_until_ready(self.compiled(self.params, self.state, gradients))
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - processor_started)


class Score(NamedTuple):
    """What is reported of a contestant."""

    name: str
    milliseconds: float  # median
    times_adamw: float
    nanoseconds_per_parameter: float
    processor_nanoseconds_per_parameter: float  # of all threads
    processor_times_adamw: float
    compile_seconds: float
    temporary_bytes: int
    float32_copy_of_8bit_states_bytes: int
    state_bytes: int


def normal_tree(key: jax.Array, like: dict[str, tuple[int, ...]], scale: float) -> dict[str, jax.Array]:
    """Normally distributed arrays."""
    keys = jax.random.split(key, len(like))
    draw = jax.jit(lambda key, shape: scale * jax.random.normal(key, shape, jnp.float32), static_argnums=1)
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, like.items(), strict=True)}


def contestants(like: dict[str, tuple[int, ...]]) -> list[Contestant]:
    """AdamW, and two profiles while warming up and after."""
    entered = [Contestant(REFERENCE, optax.adamw(1e-4), like)]
    for profile in ("balanced", "memory_optimized"):
        for warm in (True, False):
            tx = automagic_8bit(1e-4, profile=profile, warmup_steps=10_000 if warm else 1)
            name = f"{profile}, 8-bit, {'while warming up' if warm else 'after the warm-up'}"
            entered.append(Contestant(name, tx, like, warm))
    return entered


def measure(entered: list[Contestant], gradients: Any, repeats: int) -> list[Score]:
    """Times all contestants in turn, `repeats` rounds after one that is not counted."""
    for _ in range(repeats + 1):
        for contestant in entered:
            contestant.step(gradients)
    parameters = sum(x.size for x in jax.tree.leaves(gradients))
    medians = [statistics.median(contestant.seconds[1:]) for contestant in entered]
    processor = [statistics.median(contestant.processor_seconds[1:]) for contestant in entered]
    return [
        Score(
            name=contestant.name,
            milliseconds=1e3 * median,
            times_adamw=median / medians[0],
            nanoseconds_per_parameter=1e9 * median / parameters,
            processor_nanoseconds_per_parameter=1e9 * busy / parameters,
            processor_times_adamw=busy / processor[0],
            compile_seconds=contestant.compile_seconds,
            temporary_bytes=contestant.temporary_bytes,
            float32_copy_of_8bit_states_bytes=contestant.float32_states,
            state_bytes=contestant.state_bytes,
        )
        for contestant, median, busy in zip(entered, medians, processor, strict=True)
    ]


def table(scores: list[Score]) -> Table:
    """One row per contestant."""
    columns = (
        "",
        "ms",
        "× AdamW",
        "ns / parameter",
        "processor ns / parameter",
        "× AdamW",
        "compile s",
        "temporary MB",
        "8-bit states as float32 MB",
        "state MB",
    )
    shown = Table(title="one update of 50 million parameters")
    for column in columns:
        shown.add_column(column, justify="right" if column else "left")
    for score in scores:
        shown.add_row(
            score.name,
            f"{score.milliseconds:.0f}",
            f"{score.times_adamw:.2f}",
            f"{score.nanoseconds_per_parameter:.1f}",
            f"{score.processor_nanoseconds_per_parameter:.1f}",
            f"{score.processor_times_adamw:.2f}",
            f"{score.compile_seconds:.1f}",
            f"{score.temporary_bytes / 1e6:.0f}",
            f"{score.float32_copy_of_8bit_states_bytes / 1e6:.0f}",
            f"{score.state_bytes / 1e6:.0f}",
        )
    return shown


def _quantized(state: Any) -> list[QuantizedArray]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return [x for x in leaves if isinstance(x, QuantizedArray)]


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes cpu_speed.json; fails where a float32 copy of the states is held."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    options = parser.parse_args(arguments)

    like = shapes(options.layers)
    gradients = normal_tree(jax.random.key(1), like, 1e-3)
    scores = measure(contestants(like), gradients, options.repeats)
    results.console().print(table(scores))
    size = {"parameters": sum(x.size for x in gradients.values()), "arrays": len(like), "repeats": options.repeats}
    results.write(options.folder / "cpu_speed.json", {"tree": size, "scores": [score._asdict() for score in scores]})
    for score in scores:
        if 0 < score.float32_copy_of_8bit_states_bytes <= score.temporary_bytes:
            raise SystemExit(f"{score.name}: the update holds more than a float32 copy of its 8-bit states")


if __name__ == "__main__":
    main()
