"""The tasks of the soak, in the order of the report; each is done by a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.soak.endurance import STEPS
from benchmarks.soak.kills import KILLS

FUZZ_TORCH, FUZZ_TORCH_CASES = 5, 1_000
FUZZ_TORCH_COMPILED_CASES = 100
FUZZ_JAX, FUZZ_JAX_CASES = 3, 100
FUZZ_X64_CASES = 40
FUZZ_COMPILED_CASES = 200
_LAST_WARM_UP = 2**31 - 2


class Task(NamedTuple):
    """One task.

    Attributes:
        part: ``"endurance"``, ``"counters"``, ``"kills"`` or ``"fuzz"``.
        side: ``"torch"``, ``"jax"`` or ``"both"``.
        title: as the report calls it.
        work: gives its record; can be sent to another process.
    """

    part: str
    side: str
    title: str
    work: Callable[[], dict[str, Any]]


def _endurance(side: str, bits: int) -> dict[str, Any]:
    if side == "torch":
        from benchmarks.soak.endurance_torch import run
    else:
        from benchmarks.soak.endurance_jax import run
    return run(STEPS, bits)


def _counters(warmup_steps: int, dtype: str) -> dict[str, Any]:
    from benchmarks.soak.counters import run

    return run(warmup_steps, dtype)


def _large(side: str) -> dict[str, Any]:
    from benchmarks.soak.large import run

    return run(side)


def _fuzz(side: str, count: int, number: int, x64: bool = False) -> dict[str, Any]:
    from benchmarks.soak.fuzz import fuzz_jax, fuzz_torch

    return fuzz_torch(count, number) if side == "torch" else fuzz_jax(count, number, x64)


def _fuzz_compiled(side: str, count: int) -> dict[str, Any]:
    from benchmarks.soak.fuzz import fuzz_compiled, fuzz_torch_compiled

    return fuzz_torch_compiled(count, 1) if side == "torch" else fuzz_compiled(count, 1)


def _kills(side: str) -> dict[str, Any]:
    from benchmarks.soak.kills import kill_again_and_again

    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        if side == "torch":
            from benchmarks.soak.kills_torch import TorchTraining

            return kill_again_and_again(TorchTraining, folder / "run", KILLS, preload="benchmarks.soak.kills_torch")
        from benchmarks.soak.kills_jax import maker

        make = maker(folder / "compiled")
        return kill_again_and_again(make, folder / "run", KILLS, preload="benchmarks.soak.kills_jax")


TASKS: dict[str, Task] = {
    "counters-warming": Task(
        "counters", "both", "warm-up until the count ends, bfloat16", partial(_counters, _LAST_WARM_UP, "bfloat16")
    ),
    "counters-warm": Task("counters", "both", "warm-up long over, float16", partial(_counters, 3, "float16")),
    "large-torch": Task("fuzz", "torch", "one large array", partial(_large, "torch")),
    "large-jax": Task("fuzz", "jax", "one large array", partial(_large, "jax")),
    **{
        f"fuzz-torch-{i}": Task("fuzz", "torch", "random cases", partial(_fuzz, "torch", FUZZ_TORCH_CASES, i))
        for i in range(1, FUZZ_TORCH + 1)
    },
    "fuzz-torch-compiled": Task(
        "fuzz", "torch", "random cases, compiled", partial(_fuzz_compiled, "torch", FUZZ_TORCH_COMPILED_CASES)
    ),
    **{
        f"fuzz-jax-{i}": Task("fuzz", "jax", "random cases", partial(_fuzz, "jax", FUZZ_JAX_CASES, i))
        for i in range(1, FUZZ_JAX + 1)
    },
    "fuzz-jax-x64": Task("fuzz", "jax", "random cases, 64-bit numbers", partial(_fuzz, "jax", FUZZ_X64_CASES, 9, True)),
    "fuzz-jax-compiled": Task(
        "fuzz", "jax", "random cases, compiled", partial(_fuzz_compiled, "jax", FUZZ_COMPILED_CASES)
    ),
    "kills-torch": Task("kills", "torch", "PyTorch, one file by `torch.save`", partial(_kills, "torch")),
    "kills-jax": Task("kills", "jax", "JAX, Orbax `CheckpointManager`", partial(_kills, "jax")),
    "endurance-torch-8bit": Task("endurance", "torch", "PyTorch, 8-bit states", partial(_endurance, "torch", 8)),
    "endurance-torch-32bit": Task("endurance", "torch", "PyTorch, 32-bit states", partial(_endurance, "torch", 32)),
    "endurance-jax-8bit": Task("endurance", "jax", "JAX, 8-bit states", partial(_endurance, "jax", 8)),
    "endurance-jax-32bit": Task("endurance", "jax", "JAX, 32-bit states", partial(_endurance, "jax", 32)),
}
PARTS = tuple(dict.fromkeys(task.part for task in TASKS.values()))
