"""What is measured: sizes of one array, numbers of adapters, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.contestants import SEARCHING, in_jax, in_torch
from benchmarks.gpu import measuring

OURS = (
    "memory_optimized",
    "balanced",
    "balanced, stages on",
    "balanced, everything on",
    "quality_optimized, stages on",
)
TORCH, JAX = "PyTorch", "JAX"
NAMES: dict[str, tuple[str, ...]] = {
    TORCH: (
        *(name for name in in_torch.PEERS if name != "AdamW foreach"),
        *(f"ours, {name}, eager" for name in OURS if name not in SEARCHING),
        *(f"ours, {name}, compiled" for name in OURS),
    ),
    JAX: (*in_jax.PEERS, f"ours, {in_jax.QUANTIZED}", *(f"ours, {name}" for name in OURS)),
}
"""In the order in which they take turns.  Eager steps are slow: the search is left to the others."""
QUICK_NAMES: dict[str, tuple[str, ...]] = {
    TORCH: ("AdamW fused", "flashoptim FlashAdamW", "CAME", "ours, memory_optimized, eager"),
    JAX: ("optax.adamw", "flashoptim-jax", "ours, memory_optimized"),
}
NOT_HERE = in_torch.NOT_ON_A_CPU | in_jax.NOT_ON_A_CPU


def is_ours(name: str) -> bool:
    """Whether this project made it."""
    return name.startswith("ours, ")


@dataclass(frozen=True)
class Case:
    """Arrays of one step.

    Attributes:
        shapes: of the float32 parameters.
        adapters: whether they count as adapters; else it is one array.
        cold: whether what Inductor has compiled before is thrown away.  A larger array, or more of the same adapters,
            may then use what was compiled for fewer.
        seconds: how long rounds of all contestants are begun.
    """

    name: str
    shapes: measuring.Shapes
    adapters: bool
    cold: bool
    seconds: float


def _cases(chosen: dict[str, measuring.Shapes], seconds: float) -> tuple[Case, ...]:
    seen: set[bool] = set()
    found = []
    for name, shapes in chosen.items():
        adapters = measuring.is_adapters(name)
        found.append(Case(name, shapes, adapters, adapters not in seen, seconds))
        seen.add(adapters)
    return tuple(found)


CASES = _cases({n: measuring.CASES[n] for n in ("1 M", "8 M", "64 M", "200 adapters", "1,000 adapters")}, 15)
QUICK_CASES = _cases({"64 k": [(256, 256)], "4 adapters": measuring.adapters(4)}, 0)
