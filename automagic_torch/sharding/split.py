"""How a parameter and its states are split over processes (docs/algorithm.md, section 9.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from automagic_core import StatePlan
from automagic_core.arrays.state_forms import SCALARS, SLOTS, coded_shapes
from automagic_torch.codec.stored import state_forms


@dataclass(frozen=True)
class Split:
    """How an array is split into pieces along axis 0, one for each process of a mesh dimension.

    Attributes:
        mesh: the device mesh.
        placements: those of the parameter, one for each mesh dimension.
        shape: shape of the whole array.
        dim: the mesh dimension over which it is split; None where every process has all of it.
        index: number of this process's piece.
        borders: piece k is ``[borders[k], borders[k + 1])`` of axis 0; the last pieces may be empty.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    dim: int | None
    index: int
    borders: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of pieces."""
        return len(self.borders) - 1

    @property
    def group(self) -> ProcessGroup:
        """The processes that hold the pieces."""
        return self.mesh.get_group(self.dim)

    @property
    def row_size(self) -> int:
        """Number of elements for each index of axis 0."""
        return math.prod(self.shape[1:])

    @property
    def first(self) -> int:
        """Row-major index of the first element of this process's piece."""
        return self.borders[self.index] * self.row_size

    @property
    def stop(self) -> int:
        """Row-major index after the last element of this process's piece."""
        return self.borders[self.index + 1] * self.row_size

    def piece(self, x: Tensor, axis: int = 0) -> Tensor:
        """This process's piece of a whole tensor whose axis `axis` is the array's axis 0; a view."""
        start, stop = self.borders[self.index], self.borders[self.index + 1]
        return x.narrow(axis, start, stop - start)


class StateSplit(NamedTuple):
    """How one state is split.

    Attributes:
        shape, dtype: of the whole state.
        split: it is in pieces along axis 0; else every process has all of it.
        is_dtensor: it is a DTensor; scalars are plain tensors.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    split: bool
    is_dtensor: bool


def split_of(p: DTensor) -> Split:
    """How a parameter is split.

    Raises:
        ValueError: its placements are not supported.
    """
    mesh, placements, shape = p.device_mesh, tuple(p.placements), tuple(p.shape)
    # A subclass of Shard, such as tensor parallelism below FSDP makes, means another order of rows.
    along = [dim for dim, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    others = [placement for dim, placement in enumerate(placements) if dim not in along]
    if len(along) > 1 or not all(isinstance(placement, Replicate) for placement in others):
        raise ValueError(
            f"placements {placements} are not supported; valid: Shard(0) on one mesh dimension at most, "
            "Replicate() on all others"
        )
    if not along:
        return Split(mesh, placements, shape, None, 0, (0, shape[0] if shape else 1))
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError("this process is not in the device mesh of the parameter")
    count = mesh.size(along[0])
    borders = chunk_borders(shape[0], count)
    return Split(mesh, placements, shape, along[0], coordinate[along[0]], borders)


def chunk_borders(length: int, count: int) -> tuple[int, ...]:
    """The borders at which Shard(0) cuts an axis: pieces of one length, the last ones shorter or empty."""
    chunk = -(-length // count)
    return tuple(min(k * chunk, length) for k in range(count + 1))


def state_splits(split: Split, plan: StatePlan) -> dict[str, StateSplit]:
    """How every state of an array is split, those of the warm-up included."""
    return _state_splits(None if split.dim is None else split.borders, plan)


@lru_cache(maxsize=4096)
def _state_splits(borders: tuple[int, ...] | None, plan: StatePlan) -> dict[str, StateSplit]:
    # The mesh is no argument: the cache would keep it longer than its process group.
    return {
        name: StateSplit(form.shape, form.dtype, _is_split(name, form.shape, borders, plan), name not in SCALARS)
        for name, form in state_forms(plan, warming=True).items()
    }


def _is_split(name: str, shape: tuple[int, ...], borders: tuple[int, ...] | None, plan: StatePlan) -> bool:
    if borders is None or name in SCALARS:
        return False
    if name in SLOTS:
        return True
    if name.endswith("_absmax"):
        codes = name.removesuffix("_absmax")
        whole = coded_shapes(plan)[codes]
        if plan.block_size is None or not _is_split(codes, whole, borders, plan):
            return False
        return _has_whole_blocks(borders, whole, shape, plan.block_size)
    if name.endswith("_col"):
        return plan.row_axis != 0
    return plan.row_axis == 0


def _has_whole_blocks(borders: tuple[int, ...], shape: tuple[int, ...], reduced: tuple[int, ...], width: int) -> bool:
    """Whether a state with one value per `width` elements can be split so that each piece has whole blocks."""
    size, row_size, reduced_row_size = math.prod(shape), math.prod(shape[1:]), math.prod(reduced[1:])
    own = chunk_borders(reduced[0], len(borders) - 1)
    return all(
        border * row_size == min(mine * reduced_row_size * width, size)
        for border, mine in zip(borders, own, strict=True)
    )


def piece_shape(state: StateSplit, split: Split) -> tuple[int, ...]:
    """Shape of this process's piece of a state."""
    if not state.split:
        return state.shape
    start, stop = chunk_borders(state.shape[0], split.count)[split.index : split.index + 2]
    return (stop - start, *state.shape[1:])


def local_piece(value: Tensor, state: StateSplit, split: Split) -> Tensor:
    """This process's piece of a whole state; a view."""
    if not state.split:
        return value
    start, stop = chunk_borders(state.shape[0], split.count)[split.index : split.index + 2]
    return value[start:stop]


def state_placements(state: StateSplit, split: Split) -> tuple[Placement, ...]:
    """The placements of a state as a DTensor."""
    return split.placements if state.split else (Replicate(),) * split.mesh.ndim


def as_dtensor(local: Tensor, state: StateSplit, split: Split) -> Tensor:
    """The state of which this process holds `local`."""
    if not state.is_dtensor:
        return local
    # `from_local` would move a tensor on the host to the mesh's device.
    meta = TensorMeta(torch.Size(state.shape), torch.empty(state.shape, device="meta").stride(), local.dtype)
    make: Any = DTensor
    dtensor: Tensor = make(local, DTensorSpec(split.mesh, state_placements(state, split), meta), requires_grad=False)
    return dtensor
