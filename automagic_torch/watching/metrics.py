"""`optimizer.metrics()`: statistics of a torch optimizer for dashboards (docs/algorithm.md, section 13)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from automagic_core.arrays.group_keys import LOG_RATE_SCALE, STEP
from automagic_core.watching import metrics as core_metrics
from automagic_core.watching.metrics import ArrayFacts, NextStep, effective_ranks
from automagic_torch.arrays.dtensors import whole
from automagic_torch.arrays.marks import is_lora
from automagic_torch.cameamp.effective_rate import rate_in_force
from automagic_torch.cameamp.groups import group_config
from automagic_torch.watching.own_optimizer import own_optimizer

_READ = ("lr_mask", "spatial_variance", "torque_mean", "skipped_steps")


def metrics(optimizer: Any) -> dict[str, float]:
    """Rates, torque, energy removed by the stages, effective ranks, skipped steps and bytes, as floats.

    The host waits once for each device that holds states.

    Args:
        optimizer: an `AutomagicCameAMP8bit`.  If parameters are DTensors, every process must call this, since states
            are gathered.  Call it after ``scheduler.step()``, which sets the next step's `lr`.

    Returns:
        The statistics that `automagic_core.watching.metrics.metrics` describes.  Before the first step there are no
        rates, torque or energies.  ``effective_rank/<name>`` is there for every adapter; its name is the position in
        the ``state_dict`` if the optimizer was given no names.

    Raises:
        TypeError: another optimizer.
    """
    optimizer = own_optimizer(optimizer)
    arrays = [
        (group, p, optimizer.state[p]) for group, p in _parameters(optimizer) if "age" in optimizer.state.get(p, {})
    ]
    adapters = _adapters(optimizer)
    grams = [torch.stack([_gram(adapters[name]) for name in names]) for names in _by_side(adapters)]
    wanted: dict[Any, Tensor] = {
        (index, name): whole(state[name])
        for index, (_, _, state) in enumerate(arrays)
        for name in _READ
        if name in state
    }
    for index, group in enumerate(optimizer.param_groups):
        wanted["log_rate_scale", index] = group[LOG_RATE_SCALE]
        if group[STEP] > 0:
            wanted["in_force", index] = rate_in_force(group)
        if isinstance(group["lr"], Tensor):
            wanted["lr", index] = group["lr"].detach().float()
    for stage, pair in optimizer._stage_energy.items():
        wanted["energy", stage] = torch.stack(pair)
    wanted |= {("grams", index): gram for index, gram in enumerate(grams)}
    read = dict(zip(wanted, to_host(list(wanted.values())), strict=True))

    shared = {id(group): _shared(group, read, index) for index, group in enumerate(optimizer.param_groups)}
    facts = [
        ArrayFacts(
            size=p.numel(),
            log_rate_scale=shared[id(group)][0],
            lr_mask=read.get((index, "lr_mask")),
            spatial_variance=read.get((index, "spatial_variance")),
            torque_mean=float(read[index, "torque_mean"][0]),
            skipped_steps=int(read[index, "skipped_steps"][0]),
            next_step=shared[id(group)][1],
        )
        for index, (group, p, _) in enumerate(arrays)
    ]
    ranks: dict[str, float] = dict.fromkeys(adapters, 0.0)
    for index, names in enumerate(_by_side(adapters)):
        side = grams[index].shape[-1]
        found = effective_ranks(read["grams", index].reshape(-1, side, side))
        ranks |= zip(names, map(float, found), strict=True)
    energy = {stage: _share_removed(*read["energy", stage]) for stage in optimizer._stage_energy}
    in_force = [float(value[0]) for key, value in read.items() if key[0] == "in_force"]
    state_bytes = optimizer.get_memory_efficiency_report()["state_bytes"]
    return core_metrics.metrics(facts, energy, ranks, state_bytes, max(in_force, default=None))


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Copies tensors to 1-D numpy arrays, with one copy from each device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(index)
    arrays = [np.zeros(0)] * len(tensors)
    for indices in by_device.values():
        # As bytes, values of all dtypes can be copied together exactly.
        parts = [tensors[index].detach().reshape(-1).contiguous().view(torch.uint8) for index in indices]
        rest = torch.cat(parts).cpu().numpy().tobytes()
        start = 0
        for index, part in zip(indices, parts, strict=True):
            dtype = torch.empty(0, dtype=tensors[index].dtype, device="cpu").numpy().dtype
            arrays[index] = np.frombuffer(rest[start : start + part.numel()], dtype)
            start += part.numel()
    return arrays


def _parameters(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    return ((group, p) for group in optimizer.param_groups for p in dict.fromkeys(group["params"]))


def _shared(group: Mapping[str, Any], read: Mapping[Any, np.ndarray], index: int) -> tuple[float, NextStep]:
    """ℓ of a group, and its next step."""
    lr = float(read["lr", index][0] if ("lr", index) in read else group["lr"])
    return float(read["log_rate_scale", index][0]), NextStep.of(group_config(group), lr, group[STEP])


def _share_removed(before: float, after: float) -> float:
    return 1 - float(after) / float(before) if before > 0 else 0.0


def _adapters(optimizer: Optimizer) -> dict[str, Tensor]:
    """The adapters by name."""
    found: dict[str, Tensor] = {}
    position = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or ()
        if len(names) != len(group["params"]):  # none, or somebody put a parameter into the group
            names = [str(position + index) for index in range(len(group["params"]))]
        found |= {name: p for name, p in zip(names, group["params"], strict=True) if is_lora(p) and p.numel() > 0}
        position += len(group["params"])
    return found


def _by_side(adapters: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the adapters, grouped by the size and device of their Gram matrices."""
    sides: dict[Any, list[str]] = {}
    for name, p in adapters.items():
        sides.setdefault((min(p.shape), p.device), []).append(name)
    return list(sides.values())


def _gram(p: Tensor) -> Tensor:
    """W Wᵀ in float64 with the shorter side first.  It loses singular values below 10⁻⁸ of the largest."""
    W = whole(p.detach()).double()
    W = W.mT if W.shape[0] > W.shape[1] else W
    return W @ W.mT
