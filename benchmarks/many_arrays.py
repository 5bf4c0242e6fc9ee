"""A thousand adapters: ``python -m benchmarks.many_arrays``

One step of 1,000 arrays of four shapes, all of them LoRA matrices, in both frameworks, against `optax.adamw`,
`torch.optim.AdamW` and bitsandbytes' `AdamW8bit`.  The contestants of a framework take turns in one process.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_optax import automagic_8bit
from automagic_optax.arrays import batches as jax_batches
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.cameamp import batches as torch_batches
from benchmarks import results

SHAPES = ((16, 1280), (1280, 16), (32, 640), (640, 32))
STAGES_OFF: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "all", "any", "var", "linalg_vector_norm", "norm")
MOVES = (
    *("slice", "select", "unbind", "stack", "cat", "view", "reshape"),
    *("copy", "clone", "dynamic", "bitcast", "concat"),
)


class Score(NamedTuple):
    """What is reported of a contestant.

    Attributes:
        milliseconds: median of a step.
        compile_seconds: of the jitted update; 0 in PyTorch.
        operations: of one step, by kind: XLA's optimized program, or what torch dispatched.
    """

    framework: str
    name: str
    arrays: int
    milliseconds: float
    compile_seconds: float
    operations: dict[str, int]


def weights(count: int) -> list[np.ndarray]:
    """Float32 arrays N(0, 0.02²) of the four shapes in turn."""
    rng = np.random.default_rng(0)
    return [
        np.asarray(0.02 * rng.standard_normal(SHAPES[i % len(SHAPES)], dtype=np.float32), np.float32)
        for i in range(count)
    ]


def timed(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, in turn, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(values[1:]) for name, values in seconds.items()}


def jax_scores(count: int, repeats: int, transformations: dict[str, Any]) -> list[Score]:
    """One jitted update of each transformation."""
    params = [jnp.asarray(w) for w in weights(count)]
    grads = [jnp.asarray(w) for w in weights(count)]
    steps: dict[str, Callable[[], None]] = {}
    compile_seconds, operations = {}, {}
    for name, tx in transformations.items():
        started = time.perf_counter()
        held = {"state": tx.init(params)}
        compiled = jax.jit(tx.update).lower(grads, held["state"], params).compile()
        compile_seconds[name] = time.perf_counter() - started
        operations[name] = hlo_operations(compiled.as_text() or "")

        def step(compiled: Any = compiled, held: dict[str, Any] = held) -> None:
            updates, held["state"] = compiled(grads, held["state"], params)
            # The states too: else the next contestant's program would overlap with the rest of this one.
            jax.block_until_ready((updates, held["state"]))

        steps[name] = step
    found = timed(steps, repeats)
    return [Score("JAX", name, count, found[name], compile_seconds[name], operations[name]) for name in transformations]


def hlo_operations(program: str) -> dict[str, int]:
    """How many FFTs, eigendecompositions, reductions, and operations that only move data."""
    names = Counter(re.findall(r"= (?:\([^=]*\)|\S+) ([a-z\-]+)\(", program))
    moves = sum(n for name, n in names.items() if any(part in name for part in MOVES))
    eigh = len(re.findall(r'custom_call_target="[^"]*syevd[^"]*"', program))
    return {"fft": names["fft"], "eigh": eigh, "reductions": names["reduce"], "moves": moves}


class Dispatched(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def operations(self) -> dict[str, int]:
        """The kinds of `hlo_operations`."""
        return {
            "fft": sum(n for name, n in self.names.items() if "fft" in name),
            "eigh": sum(n for name, n in self.names.items() if "eigh" in name),
            "reductions": sum(n for name, n in self.names.items() if name in REDUCTIONS),
            "moves": sum(n for name, n in self.names.items() if any(part in name for part in MOVES)),
        }


def torch_scores(count: int, repeats: int, optimizers: dict[str, Callable[[list[Any]], Any]]) -> list[Score]:
    """One step of each optimizer."""
    steps: dict[str, Callable[[], None]] = {}
    operations = {}
    for name, make in optimizers.items():
        params = [torch.nn.Parameter(torch.from_numpy(w)) for w in weights(count)]
        for p in params:
            p._is_lora_layer = True  # type: ignore[attr-defined]
            p.grad = p.detach().clone()
        optimizer = make(params)
        optimizer.step()
        with Dispatched() as dispatched:
            optimizer.step()
        operations[name] = dispatched.operations()
        steps[name] = optimizer.step
    found = timed(steps, repeats)
    return [Score("PyTorch", name, count, found[name], 0.0, operations[name]) for name in optimizers]


def ours_jax(**fields: Any) -> Any:
    """Every array an adapter, after the warm-up's start."""
    return automagic_8bit(1e-4, lora=lambda path, leaf: True, **fields)


def measure(count: int, few: int, repeats: int) -> list[Score]:
    """All contestants at `count` arrays, and one by one against batched at `few`."""
    ours = {
        "ours, balanced": ours_jax(),
        "ours, balanced, stages off": ours_jax(**STAGES_OFF),
        "ours, memory_optimized": ours_jax(profile="memory_optimized"),
    }
    scores = jax_scores(count, repeats, {"optax.adamw": optax.adamw(1e-4), **ours})
    scores += jax_scores(few, repeats, {"optax.adamw": optax.adamw(1e-4), "ours, balanced": ours_jax()})
    with mock.patch.object(jax_batches, "LARGEST_ARRAY", 0):
        scores += jax_scores(few, repeats, {"ours, balanced, one by one": ours_jax()})

    def ours_torch(**fields: Any) -> Callable[[list[Any]], Any]:
        return lambda params: AutomagicCameAMP8bit(params, lr=1e-4, **{"force_8bit": True, **fields})

    contestants: dict[str, Callable[[list[Any]], Any]] = {
        "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
        "bitsandbytes AdamW8bit": lambda params: bitsandbytes.optim.AdamW8bit(params, lr=1e-4),
        "ours, balanced": ours_torch(),
        "ours, balanced, stages off": ours_torch(**STAGES_OFF),
        "ours, memory_optimized": ours_torch(profile="memory_optimized"),
    }
    scores += torch_scores(count, repeats, contestants)
    scores += torch_scores(few, repeats, {name: contestants[name] for name in ("torch.optim.AdamW", "ours, balanced")})
    with mock.patch.object(torch_batches, "ARRAY_LIMIT", {"cpu": 0, "other": 0}):
        scores += torch_scores(few, repeats, {"ours, balanced, one by one": contestants["ours, balanced"]})
    return scores


def table(scores: list[Score]) -> Table:
    """One row per contestant."""
    shown = Table(title="one step of many adapters")
    for column in ("", "", "arrays", "ms", "compile s", "FFT", "eigh", "reductions", "slices, copies, reshapes"):
        shown.add_column(column, justify="right" if column else "left")
    for score in scores:
        counted = score.operations
        shown.add_row(
            score.framework,
            score.name,
            str(score.arrays),
            f"{score.milliseconds:.1f}",
            f"{score.compile_seconds:.1f}" if score.compile_seconds else "",
            *(str(counted[kind]) for kind in ("fft", "eigh", "reductions", "moves")),
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes many_arrays.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arrays", type=int, default=1000)
    parser.add_argument("--few", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    options = parser.parse_args(arguments)
    scores = measure(options.arrays, options.few, options.repeats)
    results.console().print(table(scores))
    results.write(options.folder / "many_arrays.json", {"scores": [score._asdict() for score in scores]})


if __name__ == "__main__":
    main()
