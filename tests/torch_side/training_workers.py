"""A small network trained by several processes: plain, with DDP or with `fully_shard`, on the same global batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from automagic_torch import AutomagicCameAMP8bit, mark_lora
from tests.torch_side.sharded_workers import whole, whole_state
from tests.torch_side.torch_helpers import SMALL

BATCH = 16
FIELDS = SMALL | {"percentile_clipping": 90, "warmup_steps": 50, "torque_decay": 0.5}


class Network(nn.Module):
    """Shapes whose shards end within blocks of 256 and on their borders, and an output of fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 48)
        self.lora_A = nn.Linear(48, 8, bias=False)
        self.lora_B = nn.Linear(8, 48, bias=False)
        self.middle = nn.Linear(48, 40)
        self.last = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + self.lora_B(self.lora_A(x))
        return self.last(torch.tanh(self.middle(x)))


def build(way: str, **fields: Any) -> tuple[nn.Module, AutomagicCameAMP8bit]:
    """`way`: "plain", "ddp", "fsdp", or "hybrid", which shards within halves of the processes."""
    torch.manual_seed(0)
    model: nn.Module = Network()
    if way == "ddp":
        model = DistributedDataParallel(model)
    elif way in ("fsdp", "hybrid"):
        world = dist.get_world_size()
        sizes, names = ((2, world // 2), ("copies", "shards")) if way == "hybrid" else ((world,), ("shards",))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        fully_shard(model.middle, mesh=mesh)
        fully_shard(model, mesh=mesh)
    mark_lora(model)
    return model, AutomagicCameAMP8bit(model.named_parameters(), **FIELDS | fields)


def train(model: nn.Module, optimizer: AutomagicCameAMP8bit, steps: range) -> None:
    """Every process takes its part of each global batch; a plain model takes all of it."""
    split = isinstance(model, DistributedDataParallel) or any(hasattr(p, "device_mesh") for p in model.parameters())
    rank, world = (dist.get_rank(), dist.get_world_size()) if split else (0, 1)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 256, generator=generator), torch.randn(BATCH, 3, generator=generator)
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def everything(model: nn.Module, optimizer: AutomagicCameAMP8bit) -> dict[str, Any]:
    """Parameters, states and what the group holds, whole, by name."""
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    group = optimizer.param_groups[0]
    return {
        "params": {name: whole(p.detach()).clone() for name, p in named.items()},
        "states": {name: whole_state(optimizer, p) for name, p in named.items()},
        "group": {name: value for name, value in group.items() if name not in ("params", "param_names")},
    }


def trained(rank: int, way: str, steps: int, fields: dict[str, Any]) -> Any:
    model, optimizer = build(way, **fields)
    train(model, optimizer, range(steps))
    return everything(model, optimizer)


def saved(rank: int, way: str, path: str, at: int, until: int, **fields: Any) -> tuple[Any, Any]:
    """Trains, saves, trains on; what there was at both times."""
    model, optimizer = build(way, **fields)
    train(model, optimizer, range(at))
    there = everything(model, optimizer)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)
    train(model, optimizer, range(at, until))
    return there, everything(model, optimizer)


def loaded(rank: int, way: str, path: str, at: int, until: int, **fields: Any) -> tuple[Any, Any]:
    """Loads into a fresh model and optimizer and trains on; what there was at both times."""
    model, optimizer = build(way, **fields)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path, no_dist=way == "plain")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    there = everything(model, optimizer)
    train(model, optimizer, range(at, until))
    return there, everything(model, optimizer)


def passed_on(rank: int, way: str, at: int, until: int) -> tuple[Any, Any, Any]:
    """Gathers all on rank 0, broadcasts it into a fresh run; what was there, what came, and the same some steps on."""
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = build(way)
    train(model, optimizer, range(at))
    there = everything(model, optimizer)
    weights = get_model_state_dict(model, options=full)
    states = get_optimizer_state_dict(model, optimizer, options=full)
    assert bool(states) == (rank == 0), "only rank 0 holds what was gathered"
    fresh, fresh_optimizer = build(way)
    back = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, weights, options=back)
    set_optimizer_state_dict(fresh, fresh_optimizer, states, options=back)
    came = everything(fresh, fresh_optimizer)
    train(model, optimizer, range(at, until))
    train(fresh, fresh_optimizer, range(at, until))
    return (there, everything(model, optimizer)), (came, everything(fresh, fresh_optimizer)), states


def asked_for_states(rank: int, way: str) -> tuple[Any, Any]:
    """A run whose fresh optimizer was asked for its states, and one that was not."""
    runs = []
    for ask in (True, False):
        model, optimizer = build(way)
        if ask:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, range(3))
        runs.append(everything(model, optimizer))
    return runs[0], runs[1]
