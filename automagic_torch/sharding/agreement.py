"""What one process refuses, all refuse: else they would go on with different runs, or wait for each other for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from automagic_torch.arrays.dtensors import is_dtensor


@contextmanager
def same_in_all_processes(params: Sequence[Tensor]) -> Iterator[None]:
    """Runs checks in which no process waits for another.  All processes that hold pieces of the parameters must enter.

    Raises:
        Exception: what the checks raise.
        ValueError: the checks of another process raised something.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    refused = error is not None
    meshes = list(dict.fromkeys(p.device_mesh for p in params if is_dtensor(p)))
    for mesh in meshes + meshes[-2::-1]:  # and back, for processes that share no mesh
        flag = torch.tensor(int(refused), device=mesh.device_type)
        for group in mesh.get_all_groups():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        refused = bool(flag)
    if error is not None:
        raise error
    if refused:
        raise ValueError("another process refused the saved state; its error says why, and nothing was changed")
