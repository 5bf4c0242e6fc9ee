"""Compares which arrays have gradients, before processes wait for each other in vain (docs/algorithm.md, section 9.1).

An array that has a gradient in some of its processes only would make them exchange different things, and so hang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.arrays.stacked import to_device
from automagic_torch.cameamp.groups import parameter_name
from automagic_torch.sharding.exchange import summed
from automagic_torch.sharding.split import Split, split_of

Agreed = dict[int, list[bool]]
"""For every mesh dimension, which arrays had gradients when the processes last compared them on the host."""
Named = list[tuple[tuple[int, int], Tensor]]
"""Parameters with the numbers of their group and of their place in it."""


def agree_on_presence(groups: Sequence[Mapping[str, Any]], agreed: Agreed) -> None:
    """Raises a RuntimeError that names the first array with a gradient in some of its processes only.

    It exchanges one number per array.  On a CPU every process reads them.  On another device that would make the host
    wait in every step, so only a process reads them whose own answers have changed: at a difference there is always
    one, and it ends the run.

    Args:
        groups: the optimizer's groups, in one order in all processes.
        agreed: this process's answers when it last read; kept for the next call.
    """
    for position, (split, held) in enumerate(_by_processes(groups)):
        present = [p.grad is not None for _, p in held]
        device = held[0][1].device
        # From memory that is not pinned the host would wait for the copy, and so for the device, in every step.
        own = torch.tensor(present, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")
        (total,) = summed([to_device(own, device)], split)
        if device.type != "cpu" and agreed.get(position) == present:
            continue
        for ((group, index), _), count in zip(held, map(int, total.tolist()), strict=True):
            if 0 < count < split.count:
                name = parameter_name(groups[group], group, index)
                raise RuntimeError(
                    f"{name} has a gradient in {count} of the {split.count} processes that hold it: "
                    "all of them must have one, or none"
                )
        agreed[position] = present


def _by_processes(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Split, Named]]:
    """The arrays that are spread, by the processes and devices that hold them."""
    splits: dict[Any, Split | None] = {}
    found: dict[Any, tuple[Split, Named]] = {}
    for group_index, group in enumerate(groups):
        for index, p in enumerate(group["params"]):
            if not is_dtensor(p):
                continue
            kind = (p.device_mesh, p.placements)
            if kind not in splits:
                splits[kind] = _split(p)
            split = splits[kind]
            if split is not None:
                _, held = found.setdefault((split.mesh, split.dim, p.device), (split, []))
                held.append(((group_index, index), p))
    return list(found.values())


def _split(p: Any) -> Split | None:
    """None where no processes hold pieces of p, or where p cannot be trained."""
    try:
        split = split_of(p)
    except ValueError:
        return None
    return split if split.count > 1 else None
