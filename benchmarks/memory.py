"""What the states of a transformer of 15 M parameters and of adapters hold: ``python -m benchmarks.memory``

Counted from the arrays really held in JAX and in PyTorch, within the warm-up and after it, against Adam's two float32
moments.
"""

from __future__ import annotations

import json
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

LAYERS, WIDTH, WARM_UP = 3, 512, 2
VOCABULARY, CONTEXT = 10_240, 1024
ADAPTED, RANKS = 768, (4, 16, 64)
Shapes = Mapping[str, tuple[int, ...]]


def transformer(layers: int = LAYERS, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a GPT-like model, kernels (in, out)."""
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
    # What adapters take at worst: that of the widest matrix of a layer, and arrays too small for 8 bits.
    worst = {
        f"an adapter of rank 4, {ADAPTED} × {4 * ADAPTED}": {"a": (4, ADAPTED), "b": (4 * ADAPTED, 4)},
        f"an adapter of rank 1, {ADAPTED} × {ADAPTED}": {"a": (1, ADAPTED), "b": (ADAPTED, 1)},
        "an adapter of rank 4, 128 × 128": {"a": (4, 128), "b": (128, 4)},
    }
    return {"transformer": transformer(), **lora, **worst}


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
    picture(every)


def picture(every: list[dict[str, Any]]) -> None:
    """Bars in percent of Adam's states, into docs/memory.png: ours as counted here, the others as counted on a GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gpu = json.loads((results.FOLDER / "gpu.json").read_text())["parts"]["torch_speed"]["found"]["rows"]
    held = {row["name"]: row["state_bytes"] for row in gpu if row["case"] == "100 M"}
    ours = {(found["model"], row["profile"]): row["PyTorch"] for found in every for row in found["percent_of_adam"]}
    bars = {
        "Adam": 100.0,
        **{
            title: 100 * held[name] / (8 * 100_000_000)
            for title, name in (
                ("AdamW8bit, bitsandbytes", "bitsandbytes AdamW8bit"),
                ("FlashAdamW, FlashOptim", "flashoptim FlashAdamW"),
            )
        },
        **{
            f"ours, {profile}": ours["transformer", profile]
            for profile in ("quality_optimized", "balanced", "memory_optimized")
        },
        "ours, balanced, on adapters of rank 16": ours["adapters of rank 16, width 768", "balanced"],
    }
    figure, axes = pyplot.subplots(figsize=(7.5, 2.8))
    colours = ["#2a78d6" if name.startswith("ours") else "#9aa3ad" for name in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colours)
    axes.bar_label(drawn, fmt="%.0f %%", padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xticks([])
    axes.set_title("What an optimizer keeps, in percent of Adam's states", loc="left")
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig("docs/memory.png", dpi=110)


if __name__ == "__main__":
    main()
