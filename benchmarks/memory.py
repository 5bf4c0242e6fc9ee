"""What the states of a transformer of 15 M parameters and of adapters hold: ``python -m benchmarks.memory``

Counted from the arrays really held in JAX and in PyTorch, within the warm-up and after it, against Adam's two float32
moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from rich.table import Table

from automagic_core import PROFILES
from automagic_optax import automagic_8bit, finish_warmup, memory_report
from automagic_torch import create_improved_8bit_optimizer
from benchmarks import results
from benchmarks.cpu_speed import shapes

LAYERS, WIDTH, WARM_UP = 3, 512, 2
ADAPTED, RANKS = 768, (4, 16, 64)
Shapes = Mapping[str, tuple[int, ...]]


def adapters(rank: int, width: int = ADAPTED) -> dict[str, tuple[int, int]]:
    """Shapes of the adapters of one layer of a transformer: four projections and a feed-forward layer.

    Both matrices stand as PyTorch has them, (rank, in) and (out, rank).
    """
    sides = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    sides |= {"up": (width, 4 * width), "down": (4 * width, width)}
    found = {f"{name}.lora_a": (rank, inside) for name, (inside, _) in sides.items()}
    return found | {f"{name}.lora_b": (outside, rank) for name, (_, outside) in sides.items()}


def models() -> dict[str, Shapes]:
    """The shapes of every model."""
    lora = {f"adapters of rank {rank}, width {ADAPTED}": adapters(rank) for rank in RANKS}
    return {"transformer": shapes(LAYERS, WIDTH), **lora}


def share(report: dict[str, Any]) -> float:
    """Percent of Adam's state."""
    return 100 * report["state_bytes"] / report["adam_state_bytes"]


def in_jax(profile: str, model: Shapes) -> tuple[float, float]:
    """Percent of Adam's state in the warm-up and after it."""
    params = {name: jnp.full(shape, 0.01) for name, shape in model.items()}
    tx = automagic_8bit(1e-4, profile=profile, warmup_steps=WARM_UP)
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(WARM_UP + 1):
        _, state = step(params, state, params)
    return share(memory_report(state)), share(memory_report(finish_warmup(state)))


def in_torch(profile: str, model: Shapes) -> tuple[float, float]:
    """The same in PyTorch."""
    params = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in model.values()]
    fields: dict[str, Any] = {"lr": 1e-4, "warmup_steps": WARM_UP, "force_8bit": True}
    optimizer = create_improved_8bit_optimizer(params, profile=profile, **fields)
    shares = []
    for _ in range(WARM_UP + 1):
        for p in params:
            p.grad = p.detach().clone()
        optimizer.step()
        shares.append(share(optimizer.get_memory_efficiency_report()))
    return shares[0], shares[-1]


def main() -> None:
    """Prints a table for each model and writes memory.json."""
    every = []
    for name, model in models().items():
        size = sum(torch.Size(shape).numel() for shape in model.values())
        title = f"{name}: state in percent of Adam's, {size:,} parameters in {len(model)} arrays"
        table = Table(title=title, title_justify="left")
        for column in ("profile", "JAX", "JAX, warm-up", "PyTorch", "PyTorch, warm-up"):
            table.add_column(column, justify="left" if column == "profile" else "right")
        rows = []
        for profile in PROFILES:
            (jax_warm, jax_after), (torch_warm, torch_after) = in_jax(profile, model), in_torch(profile, model)
            shares = {
                "JAX": jax_after,
                "JAX, warm-up": jax_warm,
                "PyTorch": torch_after,
                "PyTorch, warm-up": torch_warm,
            }
            rows.append({"profile": profile, **shares})
            table.add_row(profile, *(f"{value:.2f} %" for value in shares.values()))
        results.console().print(table)
        every.append({"model": name, "parameters": size, "arrays": len(model), "percent_of_adam": rows})
    results.write(results.FOLDER / "memory.json", {"models": every})


if __name__ == "__main__":
    main()
