"""What a step costs in torch, ours beside other optimizers: a part of ``make gpu``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.gpu import measuring, torch_timer
from benchmarks.gpu.measuring import Clock, Record

Make = Callable[[list[Any]], Any]
STAGES_OFF: dict[str, Any] = {"edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
WARM_UP = 4


def _other(module: str, name: str, **arguments: Any) -> Make:
    """An optimizer of a library that may be missing."""
    return lambda params: getattr(import_module(module), name)(params, **{"lr": 1e-4, **arguments})


def _ours(**fields: Any) -> Make:
    """Ours after its warm-up, unless fields say otherwise; compiled on a GPU."""
    return lambda params: AutomagicCameAMP8bit(params, **{"lr": 1e-4, "force_8bit": True, "warmup_steps": 0, **fields})


def contestants(device: str) -> dict[str, Make]:
    """By name; the first is the reference, and comes again at the end to show the spread."""
    fused: dict[str, Any] = {"fused": True} if device == "cuda" else {}
    reference: Make = lambda params: torch.optim.AdamW(params, lr=1e-4, **fused)  # noqa: E731
    return {
        "AdamW fused": reference,
        "bitsandbytes AdamW8bit": _other("bitsandbytes.optim", "AdamW8bit"),
        "ours, balanced, stages off": _ours(**STAGES_OFF),
        "ours, balanced": _ours(),
        "ours, memory_optimized": _ours(profile="memory_optimized"),
        "ours, balanced, stages off, eager": _ours(compiled=False, **STAGES_OFF),
        "ours, quality_optimized": _ours(profile="quality_optimized"),
        "ours, balanced, warming up": _ours(warmup_steps=100_000),
        "flashoptim FlashAdamW": _other("flashoptim", "FlashAdamW", master_weight_bits=None),
        "CAME": _other("came_pytorch", "CAME"),
        "Prodigy": _other("prodigyopt", "Prodigy", lr=1.0),
        "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
        "AdamW fused, again": reference,
    }


COMPILED: dict[str, Make] = {"torchao AdamW8bit": _other("torchao.optim", "AdamW8bit")}
"""Measured after all others: its first step compiles, once for every shape."""


def measure(make: Make, shapes: measuring.Shapes, lora: bool, device: str, rounds: int) -> dict[str, Any]:
    """One optimizer on fresh parameters and gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    params = [torch.nn.Parameter(drawn(shape, 0.02)) for shape in shapes]
    for p in params:
        p._is_lora_layer = lora  # type: ignore[attr-defined]
        p.grad = drawn(tuple(p.shape), 1e-3)
    held = torch_timer.allocated(device)
    optimizer = make(params)
    first = torch_timer.seconds_of(optimizer.step, device)
    for _ in range(WARM_UP):
        optimizer.step()
    state_bytes = torch_timer.allocated(device) - held
    found = torch_timer.timed(optimizer.step, device, rounds)
    count = sum(p.numel() for p in params)
    peak = torch_timer.peak_of(optimizer.step, device)
    if not all(bool(torch.isfinite(p).all()) for p in params):
        found["error"] = "parameters are not finite"
    return {
        "parameters": count,
        **found,
        **measuring.per_parameter(found["ms"], count, state_bytes),
        "state_bytes": state_bytes,
        "peak_bytes": peak,
        "first_step_seconds": first,
    }


def main() -> None:
    """Every case, every contestant."""
    options = measuring.options(__doc__)
    record, clock = Record(options.out), Clock(options.seconds)
    cases = measuring.SMALL_CASES if options.small else measuring.CASES
    for entered in (contestants(options.device), COMPILED):
        for case, shapes in cases.items():
            for name, make in entered.items():
                if clock.is_over():
                    record.put("unfinished", f"{case}, {name} and what comes after")
                    return
                row: dict[str, Any] = {"framework": "torch", "case": case, "name": name}
                try:
                    lora = measuring.is_adapters(case)
                    row |= measure(make, shapes, lora, options.device, 2 if options.small else measuring.ROUNDS)
                except Exception as error:
                    row |= measuring.failure(error)
                record.add("rows", row)
                if options.device == "cuda":
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
