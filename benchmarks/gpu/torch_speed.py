"""What a step costs in torch, ours beside other optimizers: a part of ``make gpu``."""

from __future__ import annotations

from typing import Any

import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.contestants.in_torch import PEERS, Make, ours
from benchmarks.gpu import measuring, torch_timer
from benchmarks.gpu.measuring import Clock, Record

WARM_UP = 4


def contestants() -> dict[str, Make]:
    """By name; the first is the reference, and comes again at the end to show the spread."""
    reference = "AdamW fused"
    return {
        **{name: PEERS[name] for name in (reference, "bitsandbytes AdamW8bit")},
        **{f"ours, {name}": ours(name) for name in ("balanced", "balanced, stages on", "memory_optimized")},
        "ours, balanced, eager": ours("balanced", compiled=False),
        "ours, quality_optimized": ours("quality_optimized"),
        "ours, balanced, warming up": ours("balanced", warmup_steps=100_000),
        **{name: PEERS[name] for name in ("flashoptim FlashAdamW", "CAME", "Prodigy", "AdamW foreach")},
        f"{reference}, again": PEERS[reference],
    }


OURS_COMPILED = (
    *("ours, balanced", "ours, balanced, stages on", "ours, memory_optimized", "ours, quality_optimized"),
    "ours, balanced, warming up",
)
COMPILED: dict[str, Make] = {name: PEERS[name] for name in ("torchao AdamW8bit",)}
"""Measured after all others: its first step compiles, once for every shape."""


def drawn_params(shapes: measuring.Shapes, lora: bool, device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale)

    params = [torch.nn.Parameter(drawn(shape, 0.02)) for shape in shapes]
    for p in params:
        p._is_lora_layer = lora  # type: ignore[attr-defined]
        p.grad = drawn(tuple(p.shape), 1e-3)
    return params


def compile_some(record: Record, cases: dict[str, measuring.Shapes], device: str, share: str) -> None:
    """First steps in a process beside others, which leave their programs in Inductor's cache."""
    index, count = map(int, share.split("/"))
    for case, name in [(case, name) for case in cases for name in OURS_COMPILED][index - 1 :: count]:
        row: dict[str, Any] = {"framework": "torch", "case": case, "name": name}
        try:
            optimizer = contestants()[name](drawn_params(cases[case], measuring.is_adapters(case), device))
            row["first_step_seconds"] = torch_timer.seconds_of(optimizer.step, device)
        except Exception as error:
            row |= measuring.failure(error)
        record.add("compiled", row)
        del optimizer
        if device == "cuda":
            torch.cuda.empty_cache()


def measure(make: Make, shapes: measuring.Shapes, lora: bool, device: str, rounds: int) -> dict[str, Any]:
    """One optimizer on fresh parameters and gradients."""
    params = drawn_params(shapes, lora, device)
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
    if isinstance(optimizer, AutomagicCameAMP8bit) and not _has_its_bits(optimizer):
        found["error"] = "its states are in 32 bits"
    return {
        "parameters": count,
        **found,
        **measuring.per_parameter(found["ms"], count, state_bytes),
        "state_bytes": state_bytes,
        "peak_bytes": peak,
        "first_step_seconds": first,
    }


def _has_its_bits(optimizer: AutomagicCameAMP8bit) -> bool:
    """Whether a state has 8 bits, if states should; without bitsandbytes none has."""
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return any(x.dtype == torch.uint8 for x in tensors) or optimizer.param_groups[0]["optim_bits"] != 8


def main() -> None:
    """Every case, every contestant."""
    options = measuring.options(__doc__)
    record, clock = Record(options.out), Clock(options.seconds)
    cases = measuring.SMALL_CASES if options.small else measuring.CASES
    if options.compile:
        compile_some(record, cases, options.device, options.compile)
        return
    for entered in (contestants(), COMPILED):
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
