"""The PyTorch side of the long run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.soak.endurance import FIELDS, Trained, batches, endure, warmup_steps, weights


def run(steps: int, optim_bits: int) -> dict[str, Any]:
    """The record of a run; this process should have done nothing else."""
    torch.set_num_threads(1)
    params = {name: torch.nn.Parameter(torch.from_numpy(w)) for name, w in weights().items()}
    for name in ("lora_a", "lora_b"):
        params[name]._is_lora_layer = True  # type: ignore[attr-defined]
    optimizer = AutomagicCameAMP8bit(params.values(), optim_bits=optim_bits, warmup_steps=warmup_steps(steps), **FIELDS)
    inputs, targets = map(torch.from_numpy, batches())

    def step(t: int) -> float:
        optimizer.zero_grad()
        loss = (_output(params, inputs[t % len(inputs)]) - targets[t % len(inputs)]).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def all_finite() -> bool:
        states = [x for state in optimizer.state.values() for x in state.values()]
        return all(bool(torch.isfinite(x).all()) for x in (*params.values(), *states))

    record = endure(Trained(step, all_finite, lambda: optimizer.param_groups[0]["automagic_step"]), steps)
    report = optimizer.get_memory_efficiency_report()
    return record | {"parameters": report["total_parameters"], "8bit_parameters": report["8bit_parameters"]}


def _output(params: dict[str, torch.nn.Parameter], x: Tensor) -> Tensor:
    weight = params["layer"] + params["lora_b"] @ params["lora_a"].T
    return torch.tanh(x @ weight.T + params["bias"])
