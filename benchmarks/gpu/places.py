"""Parameters on several devices, and states in the host's memory: a part of ``make gpu``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.gpu import measuring, torch_timer
from benchmarks.gpu.measuring import Record

SHAPES: measuring.Shapes = [(16, 256), (16, 256), (64, 8), (4, 3, 3, 3), (5,), (), (300, 70)]
FIELDS: dict[str, Any] = {
    "lr": 1e-3,
    "max_lr": 1e-1,
    "warmup_steps": 4,
    "min_8bit_size": 16,
    "force_8bit": True,
    "torque_decay": 0.5,
    "percentile_clipping": 90,
}
STEPS = 7  # past the end of the warm-up


def parameters(device: str, seed: int, shapes: measuring.Shapes) -> list[torch.nn.Parameter]:
    """The same values on any device; the third array is an adapter."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for p in made:
        p._is_lora_layer = p.shape == SHAPES[2]  # type: ignore[attr-defined]
    return made


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    """The same values on any device."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (0.5 + torch.randn(p.shape, generator=generator)).to(p.device)


def differing(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of tensors differ in a bit."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        bits = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)] if same else []
        return [] if same and torch.equal(*bits) else [path]
    if isinstance(a, dict):
        return [p for key in a.keys() | b.keys() for p in differing(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        return [p for i, (x, y) in enumerate(zip(a, b, strict=True)) for p in differing(x, y, f"{path}[{i}]")]
    return [] if a == b else [path]


def groups_on(first: str, second: str) -> dict[str, Any]:
    """One optimizer with a group on each of two devices, against an optimizer for each: they take the same steps."""
    together = [parameters(first, 0, SHAPES), parameters(second, 1, SHAPES)]
    apart = [parameters(first, 0, SHAPES), parameters(second, 1, SHAPES)]
    one = AutomagicCameAMP8bit([{"params": params} for params in together], **FIELDS)
    each = [AutomagicCameAMP8bit(params, **FIELDS) for params in apart]
    for step in range(STEPS):
        for params in (*together, *apart):
            give_gradients(params, step)
        one.step()
        for optimizer in each:
            optimizer.step()
    where = [path for a, b in zip(together, apart, strict=True) for path in differing(a, b, "parameters")]
    for params, optimizer in zip(together, each, strict=True):
        for p, q in zip(params, optimizer.param_groups[0]["params"], strict=True):
            where += differing(dict(one.state[p]), dict(optimizer.state[q]), "state")
    places = {str(x.device) for p in together[1] for x in one.state[p].values()}
    loaded = AutomagicCameAMP8bit(
        [{"params": parameters(first, 0, SHAPES)}, {"params": parameters(second, 1, SHAPES)}], **FIELDS
    )
    loaded.load_state_dict(copy.deepcopy(one.state_dict()))
    where += differing(loaded.state_dict(), one.state_dict(), "loaded")
    return {
        "same_bits": not where,
        "differing": where[:20],
        "second_group_at": sorted(places),
        "metrics": one.metrics(),
    }


def states_on_the_host(device: str) -> dict[str, Any]:
    """The same run with the states beside their parameters and in the host's memory: every bit the same."""
    kept, offloaded = (parameters(device, 0, SHAPES) for _ in range(2))
    beside = AutomagicCameAMP8bit(kept, **FIELDS)
    away = AutomagicCameAMP8bit(offloaded, state_device="cpu", **FIELDS)
    for step in range(STEPS):
        for params in (kept, offloaded):
            give_gradients(params, step)
        beside.step()
        away.step()
    where = differing(kept, offloaded, "parameters")
    where += differing(beside.state_dict()["state"], away.state_dict()["state"], "state")
    tensors = [x for state in away.state.values() for x in state.values()]
    return {
        "same_bits": not where,
        "differing": where[:20],
        "all_on_the_host": all(x.device.type == "cpu" for x in tensors),
        "pinned": sum(x.is_pinned() for x in tensors) if device == "cuda" else None,
        "tensors": len(tensors),
    }


def cost_of_the_host(device: str, shapes: measuring.Shapes, rounds: int) -> dict[str, Any]:
    """A step with the states beside their parameters and in the host's memory."""
    found: dict[str, Any] = {}
    for name, place in (("beside", None), ("host", "cpu")):
        params = [torch.nn.Parameter(torch.randn(shape, device=device).mul_(0.02)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p).mul_(1e-3)
        held = torch_timer.allocated(device)
        optimizer = AutomagicCameAMP8bit(params, lr=1e-4, warmup_steps=2, force_8bit=True, state_device=place)
        for _ in range(4):
            optimizer.step()
        found[name] = {"device_bytes_of_states": torch_timer.allocated(device) - held}
        found[name] |= torch_timer.timed(optimizer.step, device, rounds)
        found[name]["peak_bytes"] = torch_timer.peak_of(optimizer.step, device)
        del optimizer, params
    return found


def main() -> None:
    """All of it."""
    options = measuring.options(__doc__)
    record, device = Record(options.out), options.device
    record.tried("groups on the CPU and the device", lambda: groups_on("cpu", device))
    record.tried("groups on the device and the CPU", lambda: groups_on(device, "cpu"))
    if device == "cuda" and torch.cuda.device_count() > 1:
        record.tried("groups on two GPUs", lambda: groups_on("cuda:0", "cuda:1"))
    else:
        record.put("groups on two GPUs", {"skipped": "there is one device"})
    record.tried("states on the host", lambda: states_on_the_host(device))
    rounds = 2 if options.small else 5
    for case, shapes in (measuring.SMALL_CASES if options.small else measuring.CASES).items():
        if options.small or case in ("64 M", "200 adapters"):
            record.tried(f"cost of the host, {case}", partial(cost_of_the_host, device, shapes, rounds))


if __name__ == "__main__":
    main()
