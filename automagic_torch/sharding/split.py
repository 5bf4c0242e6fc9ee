"""How a parameter is split over processes, and how its states are split with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from automagic_core import StatePlan
from automagic_torch.codec.stored import SCALARS, SLOTS, state_forms


@dataclass(frozen=True)
class Split:
    """An array in pieces along axis 0, one for each process of a mesh dimension.

    Attributes:
        mesh: the device mesh.
        placements: the parameter's, one for each mesh dimension.
        shape: of the whole array.
        dim: the mesh dimension over which it is split; None where every process has all of it.
        index: this process's place along that dimension.
        borders: of the pieces along axis 0: piece k is ``[borders[k], borders[k + 1])``; the last ones may be empty.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    dim: int | None
    index: int
    borders: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self.borders) - 1

    @property
    def group(self) -> ProcessGroup:
        """The processes that hold the pieces."""
        return self.mesh.get_group(self.dim)

    @property
    def row_size(self) -> int:
        """Elements for each step along axis 0."""
        return math.prod(self.shape[1:])

    def element_borders(self) -> list[int]:
        """Row-major indices at which the pieces begin, and the size of the array."""
        return [border * self.row_size for border in self.borders]

    @property
    def first(self) -> int:
        """Row-major index of the first element that is here."""
        return self.borders[self.index] * self.row_size

    @property
    def stop(self) -> int:
        """Row-major index behind the last element that is here."""
        return self.borders[self.index + 1] * self.row_size

    def piece(self, x: Tensor, axis: int = 0) -> Tensor:
        """What is here of a whole tensor with the array's axis 0 at `axis`; a view."""
        start, stop = self.borders[self.index], self.borders[self.index + 1]
        return x.narrow(axis, start, stop - start)


class Place(NamedTuple):
    """Where one state lives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    split: bool
    """In pieces along axis 0; else every process has all of it."""
    is_dtensor: bool


def split_of(p: DTensor) -> Split:
    """How a parameter is split.

    Raises:
        ValueError: its placements are not supported.
    """
    mesh, placements, shape = p.device_mesh, tuple(p.placements), tuple(p.shape)
    # A subclass of Shard, as tensor parallelism below FSDP makes it, means another order of rows.
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
    """Where Shard(0) cuts an axis: pieces of one length, the last ones shorter or empty."""
    chunk = -(-length // count)
    return tuple(min(k * chunk, length) for k in range(count + 1))


def places(split: Split, plan: StatePlan) -> dict[str, Place]:
    """Where every state of an array lives, those that only a warm-up needs included."""
    return _places(None if split.dim is None else split.borders, plan)


@lru_cache(maxsize=4096)
def _places(borders: tuple[int, ...] | None, plan: StatePlan) -> dict[str, Place]:
    # Not by the mesh: one that is kept here would outlive its process group.
    return {
        name: Place(form.shape, form.dtype, _is_split(name, form.shape, borders, plan), name not in SCALARS)
        for name, form in state_forms(plan, warming=True).items()
    }


def _is_split(name: str, shape: tuple[int, ...], borders: tuple[int, ...] | None, plan: StatePlan) -> bool:
    if borders is None or name in SCALARS:
        return False
    if name in SLOTS:
        return True
    if name.endswith("_absmax"):
        return plan.block_size is not None and _has_whole_blocks(borders, plan.shape, shape, plan.block_size)
    if name == "last_polarity":
        return len(plan.shape) > 1 or _has_whole_blocks(borders, plan.shape, shape, 8)
    if name.endswith("_col"):
        return plan.row_axis != 0
    return plan.row_axis == 0


def _has_whole_blocks(borders: tuple[int, ...], shape: tuple[int, ...], reduced: tuple[int, ...], width: int) -> bool:
    """Whether a state with one value for every `width` elements can be split so that each piece has its own."""
    size, row_size, reduced_row_size = math.prod(shape), math.prod(shape[1:]), math.prod(reduced[1:])
    own = chunk_borders(reduced[0], len(borders) - 1)
    return all(
        border * row_size == min(mine * reduced_row_size * width, size)
        for border, mine in zip(borders, own, strict=True)
    )


def piece_shape(place: Place, split: Split) -> tuple[int, ...]:
    """Shape of what this process has of a state."""
    if not place.split:
        return place.shape
    borders = chunk_borders(place.shape[0], split.count)
    return (borders[split.index + 1] - borders[split.index], *place.shape[1:])


def local_piece(value: Tensor, place: Place, split: Split) -> Tensor:
    """What this process has of a whole state that is split; a view."""
    borders = chunk_borders(place.shape[0], split.count)
    return value.narrow(0, borders[split.index], borders[split.index + 1] - borders[split.index])


def as_dtensor(local: Tensor, split: Split, place: Place) -> Tensor:
    """A state of which `local` is here."""
    if not place.is_dtensor:
        return local
    placements = split.placements if place.split else (Replicate(),) * split.mesh.ndim
    shape = torch.Size(place.shape)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Not `from_local`, which moves what is on the host to the mesh's device.
    spec = DTensorSpec(split.mesh, placements, TensorMeta(shape, tuple(strides), local.dtype))
    return DTensor(local, spec, requires_grad=False)
