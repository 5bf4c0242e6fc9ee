"""What the processes of the tests of sharded parameters do."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from automagic_core import Config
from automagic_core.arrays.group_keys import SEARCH_KEYS
from automagic_torch import AutomagicCameAMP8bit, ProgressiveQuantization, load_adam_state, load_requantized
from automagic_torch.cameamp.call import Call
from tests.torch_side.torch_helpers import SMALL, parameters

SHAPES = ((3,), (1000,), (2048,), (8, 6), (8, 6), (7, 256), (33, 48), (2, 5), (5, 2, 3), (6, 4, 5, 5), (5, 3, 4, 6))
"""Borders within blocks and bytes and between them, fewer rows than processes, and two arrays that make a batch."""


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(optimizer: AutomagicCameAMP8bit, p: Tensor) -> dict[str, Tensor]:
    return {name: whole(value).clone() for name, value in optimizer.state[p].items()}


def meshes(world: int, hybrid: bool) -> tuple[DeviceMesh, list[Placement]]:
    if hybrid:
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards")), [Replicate(), Shard(0)]
    return init_device_mesh("cpu", (world,)), [Shard(0)]


def gradient(shape: torch.Size, step: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return 0.5 + torch.randn(shape, generator=generator)


def steps_from_one_state(
    rank: int, world: int, hybrid: bool, dtype: torch.dtype, steps: int, fields: dict[str, Any]
) -> list[dict[str, Any]]:
    """Steps sharded and whole, every whole step from the sharded state: what they give, by step and parameter."""
    mesh, placements = meshes(world, hybrid)
    alone = parameters(SHAPES, dtype)
    spread = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in alone]
    for params in (alone, spread):
        params[3]._is_lora_layer = params[4]._is_lora_layer = True
    made = [AutomagicCameAMP8bit(params, **SMALL | fields) for params in (alone, spread)]
    updates: list[list[Tensor]] = [[], []]
    for optimizer, shown in zip(made, updates, strict=True):
        optimizer._on_update = lambda p, update, shown=shown: shown.append(whole(update).clone())
    results = []
    for step in range(1, steps + 1):
        for index, (p, q) in enumerate(zip(alone, spread, strict=True)):
            g = gradient(p.shape, step, index).to(dtype)
            if step == 2 and index == 6:
                g[-1] = torch.nan
            p.grad = None if (step, index) == (3, 5) else g
            q.grad = None if p.grad is None else distribute_tensor(g.clone(), mesh, placements)
        for shown in updates:
            shown.clear()
        for optimizer in made:
            optimizer.step()
        results.append(
            {
                "updates": [list(shown) for shown in updates],
                "params": [[whole(p.detach()).clone() for p in params] for params in (alone, spread)],
                "states": [
                    [whole_state(o, p) if o.state.get(p) else {} for p in params]
                    for o, params in zip(made, (alone, spread), strict=True)
                ],
                "shared": [{k: v.clone() for k, v in o.param_groups[0].items() if isinstance(v, Tensor)} for o in made],
                "energy": [o._stage_energy for o in made],
            }
        )
        for p, q in zip(alone, spread, strict=True):
            p.data.copy_(whole(q.detach()))
            if made[1].state.get(q):
                made[0].state[p] = whole_state(made[1], q)
        for name, value in results[-1]["shared"][1].items():
            made[0].param_groups[0][name] = value.clone()
    return results


def gathered_on_demand(rank: int) -> dict[str, Any]:
    """What works on whole states, on sharded ones and on the same ones whole: results of both, by name."""
    mesh, placements = meshes(2, hybrid=False)
    alone = parameters(SHAPES)
    spread = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in alone]
    both: dict[str, list[Any]] = {}

    def note(name: str, optimizer: AutomagicCameAMP8bit, params: list[nn.Parameter]) -> None:
        both.setdefault(name, []).append([whole_state(optimizer, p) for p in params])

    saved: dict[str, Any] = {}
    for params in (alone, spread):
        adam = torch.optim.AdamW(params)
        for p, q in zip(params, alone, strict=True):
            g = gradient(q.shape, 1, 0)
            p.grad = g if p is q else distribute_tensor(g, mesh, placements)
        adam.step()
        optimizer = AutomagicCameAMP8bit(params, **SMALL)
        load_adam_state(optimizer, adam.state_dict())
        note("from Adam", optimizer, params)
        in_32_bits = AutomagicCameAMP8bit(params, **SMALL | {"optim_bits": 32})
        load_requantized(in_32_bits, optimizer.state_dict())
        note("in 32 bits", in_32_bits, params)
        moving = AutomagicCameAMP8bit(params, **SMALL)
        quantization = ProgressiveQuantization(moving, total_steps=1)
        moving.load_state_dict(saved.setdefault("in 32 bits", in_32_bits.state_dict()))
        moving.param_groups[0]["automagic_optim_bits"] = 8
        quantization.step()
        note("progressive", moving, params)
        both.setdefault("metrics", []).append(moving.metrics())
        both.setdefault("report", []).append(moving.get_memory_efficiency_report())
    return both


def refusals(rank: int) -> list[str]:
    """What the optimizer says to placements that it cannot work with."""
    mesh = init_device_mesh("cpu", (2,))
    messages = []
    for placements in ([Shard(1)], [Partial()]):
        if isinstance(placements[0], Partial):
            p: Tensor = DTensor.from_local(torch.zeros(4, 4), mesh, placements)
        else:
            p = distribute_tensor(torch.zeros(4, 4), mesh, placements)
        try:
            AutomagicCameAMP8bit([("weight", nn.Parameter(p))])
        except ValueError as error:
            messages.append(str(error))
    for original in (True, False):
        model = FullyShardedDataParallel(nn.Linear(8, 6), device_id=torch.device("cpu"), use_orig_params=original)
        try:
            AutomagicCameAMP8bit(model.named_parameters())
        except ValueError as error:
            messages.append(str(error))
    return messages


def gradient_in_one_process(rank: int) -> tuple[str, bool]:
    """What every process says to a gradient that only the first has, and whether a weight changed."""
    mesh, placements = meshes(2, hybrid=False)
    params = [nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, placements)) for _ in range(3)]
    optimizer = AutomagicCameAMP8bit(zip("abc", params, strict=True), **SMALL)
    for step in range(2):
        for index, p in enumerate(params):
            # Distributed in both processes; the second one loses its piece of "b" in the second step.
            p.grad = distribute_tensor(gradient(p.shape, step, index), mesh, placements)
        if step == 1:
            params[2].grad = None  # in both: no difference
            before = params[0].to_local().clone()
            if rank == 1:
                params[1].grad = None
            try:
                optimizer.step()
            except RuntimeError as error:
                return str(error), not torch.equal(before, params[0].to_local())
        optimizer.step()
    return "no error", True


def damaged_in_one_process(rank: int) -> tuple[str, int]:
    """What every process says to a saved piece that is damaged in the second alone, and how many arrays have states."""
    mesh, placements = meshes(2, hybrid=False)
    made = [
        AutomagicCameAMP8bit([("a", nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, placements)))], **SMALL)
        for _ in range(2)
    ]
    (p,) = made[0].param_groups[0]["params"]
    p.grad = distribute_tensor(gradient(p.shape, 0, 0), mesh, placements)
    made[0].step()
    saved = made[0].state_dict()
    if rank == 1:
        saved["state"][0]["exp_avg_absmax"].to_local().fill_(torch.nan)
    try:
        made[1].load_state_dict(saved)
    except ValueError as error:
        return str(error), len(made[1].state)
    return "no error", len(made[1].state)


def kept_of_pinned(rank: int) -> tuple[Tensor, Tensor, list[str]]:
    """A walk that is pinned, what is kept of it, and of what types the tensors were that were pinned."""
    mesh, placements = meshes(2, hybrid=False)
    walk = distribute_tensor(gradient(torch.Size((5, 6)), 0, 0), mesh, placements)
    pinned: list[str] = []

    def pin_memory(x: Tensor) -> Tensor:
        pinned.append(type(x).__name__)
        return x

    with patch.object(Tensor, "is_pinned", lambda x: True), patch.object(Tensor, "pin_memory", pin_memory):
        group = {key: torch.zeros(()) for key in SEARCH_KEYS}
        call = Call(group, Config(warmup_steps=10), 5)
        with patch.object(Call, "kept", lambda self, device: 0.5):
            kept = call.kept_of(walk)
    assert isinstance(kept, DTensor)
    assert (kept.device_mesh, kept.placements, kept.shape) == (mesh, walk.placements, walk.shape)
    assert kept.to_local().data_ptr() != walk.to_local().data_ptr()
    return walk.full_tensor(), kept.full_tensor(), pinned
