"""Does the rate search find its rate?  ``python -m benchmarks.find_rate``

Trains the byte transformer from one seed with a cosine schedule and reports the validation loss: AdamW tuned by hand,
ours at the same rates without the search, and ours with it from starting rates that lie four decades apart.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from automagic_optax import automagic_8bit
from benchmarks import byte_transformer, results

BATCH, SEED = 32, 0
VALIDATION_BATCHES = 32
RAMP = 50
WEIGHT_DECAY = 5e-4

Build = Callable[[Any, int], optax.GradientTransformationExtraArgs]
"""(starting rate, steps) → transformation; the rate may be traced, so that all rates share one compilation."""


class Entry(NamedTuple):
    """One row of the table."""

    name: str
    build: Build
    rates: tuple[float, ...]
    searches: bool = False


class Run(NamedTuple):
    """What became of one starting rate."""

    name: str
    start: float
    validation_loss: float
    found_rate: float | None  # starting rate · exp(log_rate_scale), before the schedule; None without a search
    seconds: float


def cosine(rate: Any, steps: int) -> Callable[[Any], Any]:
    """From `rate` to zero in half a cosine."""
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, steps) / steps))


def adamw(rate: Any, steps: int) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with a ramp of `RAMP` steps."""
    schedule = cosine(rate, steps)
    return optax.adamw(lambda count: schedule(count) * jnp.minimum(1.0, (count + 1) / RAMP), weight_decay=WEIGHT_DECAY)


def ours(rate: Any, steps: int, **overrides: Any) -> optax.GradientTransformationExtraArgs:
    """`automagic_8bit`; by default it searches for 40 % of the steps."""
    overrides = {"warmup_steps": 2 * steps // 5, **overrides}
    return automagic_8bit(
        cosine(rate, steps),
        weight_decay=WEIGHT_DECAY,
        embedding=byte_transformer.is_embedding,
        max_lr=1.0,
        **overrides,
    )


NO_STAGES: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
"""Moments and search alone, without the gradient stages."""

BY_HAND = (1e-3, 3e-3, 1e-2, 2e-2)
ENTRIES = (
    Entry("AdamW, 32-bit", adamw, BY_HAND),
    Entry(
        "ours without the search, 32-bit",
        functools.partial(ours, search_gain=0.0, optim_bits=32, warmup_steps=4 * RAMP, **NO_STAGES),
        BY_HAND,
    ),
    Entry("ours with the search, 8-bit", functools.partial(ours, **NO_STAGES), (1e-6, 1e-5, 1e-4, 1e-3, 3e-3), True),
    Entry("memory_optimized, 8-bit", functools.partial(ours, profile="memory_optimized"), (1e-5, 1e-3), True),
)


def train(entry: Entry, steps: int) -> list[Run]:
    """Trains once from each of the entry's rates, on the same batches in the same order."""
    text = byte_transformer.standard_library()
    context = byte_transformer.Shape().context

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array, rate: jax.Array) -> tuple[Any, Any]:
        gradients = jax.grad(byte_transformer.loss)(params, batch)
        updates, state = entry.build(rate, steps).update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    runs = []
    for rate in entry.rates:
        started = time.perf_counter()
        rng = np.random.default_rng(SEED)
        params = byte_transformer.initial_params(jax.random.key(SEED))
        state = entry.build(rate, steps).init(params)
        for _ in range(steps):
            batch = byte_transformer.windows(text.train, BATCH, context, rng)
            params, state = step(params, state, batch, jnp.float32(rate))
        found = rate * float(jnp.exp(optax.tree_utils.tree_get(state, "log_rate_scale"))) if entry.searches else None
        runs.append(Run(entry.name, rate, validation_loss(params), found, time.perf_counter() - started))
    return runs


def validation_loss(params: Any) -> float:
    """Mean loss over windows of the held-out files that are the same for every run."""
    rng = np.random.default_rng(SEED + 1)
    text, context = byte_transformer.standard_library().validation, byte_transformer.Shape().context
    batches = [byte_transformer.windows(text, 2 * BATCH, context, rng) for _ in range(VALIDATION_BATCHES)]
    return float(np.mean([_evaluate(params, batch) for batch in batches]))


@jax.jit
def _evaluate(params: Any, batch: jax.Array) -> jax.Array:
    return byte_transformer.loss(params, batch)


def table(runs: list[Run]) -> Table:
    """One row per entry, one column per starting rate; the rate it ended with in a row of its own."""
    starts = sorted({run.start for run in runs})
    shown = Table("", *(f"{start:g}" for start in starts), title="validation loss by starting rate")
    for name in dict.fromkeys(run.name for run in runs):
        by_start = {run.start: run for run in runs if run.name == name}
        losses = [f"{by_start[start].validation_loss:.3f}" if start in by_start else "" for start in starts]
        shown.add_row(name, *losses)
        if any(run.found_rate is not None for run in by_start.values()):
            found = [by_start[start].found_rate if start in by_start else None for start in starts]
            shown.add_row("  the rate it ended with", *("" if rate is None else f"{rate:.2g}" for rate in found))
    return shown


def plot(runs: list[Run], path: Path) -> None:
    """Loss against starting rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for marker, name in zip("so^v", dict.fromkeys(run.name for run in runs), strict=False):
        points = [(run.start, run.validation_loss) for run in runs if run.name == name]
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set(xscale="log", xlabel="starting learning rate", ylabel="validation loss (nats per byte)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Runs every entry, prints the table, writes find_rate.json and find_rate.png."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    options = parser.parse_args(arguments)

    console = results.console()
    runs: list[Run] = []
    for entry in ENTRIES:
        with console.status(entry.name):
            runs += train(entry, options.steps)
    console.print(table(runs))
    settings = {"steps": options.steps, "batch": BATCH, "seed": SEED, "ramp_without_search": RAMP}
    settings |= {"weight_decay": WEIGHT_DECAY, "model": byte_transformer.Shape()._asdict()}
    results.write(options.folder / "find_rate.json", {"settings": settings, "runs": [run._asdict() for run in runs]})
    plot(runs, options.folder / "find_rate.png")


if __name__ == "__main__":
    main()
