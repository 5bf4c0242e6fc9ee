"""Recognizes DTensors, which several processes hold together, without importing `torch.distributed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def whole(x: Tensor) -> Tensor:
    """The whole of a DTensor, on its piece's device; all processes must ask at once.  Other tensors as they are."""
    return for_exchange(x).full_tensor().to(x.device) if is_dtensor(x) else x


def for_exchange(x: DTensor) -> DTensor:
    """x, or a copy of what the host keeps on the mesh's device: a group of nccl alone exchanges nothing else."""
    there = x.device_mesh.device_type
    return cast("DTensor", x.to(there)) if x.device.type == "cpu" != there else x


def with_local(x: DTensor, local: Tensor) -> DTensor:
    """A DTensor like x of which this process holds `local`, wherever that is."""
    # `from_local` would move a tensor on the host to the mesh's device.
    make: Any = type(x)
    made: DTensor = make(local, x._spec, requires_grad=False)
    return made


def is_dtensor(x: Tensor) -> TypeGuard[DTensor]:
    """Whether x is a DTensor."""
    return hasattr(x, "device_mesh")
