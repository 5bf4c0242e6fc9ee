"""Decides how the states of an array are split over a mesh (`docs/algorithm.md`, section 9.2)."""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from automagic_core import StatePlan
from automagic_core.codec.blocks import Shape, absmax_shape
from automagic_optax.sharding.placement import parts, statistic_sharding


class StateShardings:
    """The shardings of one array's states.

    Args:
        parameter: how the parameter is split; None where that is unknown, and then every sharding is None.
        plan: the array's states.
    """

    def __init__(self, parameter: NamedSharding | None, plan: StatePlan) -> None:
        self._parameter = parameter
        self._plan = plan

    def part(self, shape: Shape) -> NamedSharding | None:
        """Of a state of the parameter's shape, or of a row or column statistic."""
        return self._parameter and statistic_sharding(self._parameter, self._plan.shape, shape)

    @property
    def scalar(self) -> NamedSharding | None:
        """Whole on every device."""
        return self._parameter and NamedSharding(self._parameter.mesh, PartitionSpec())

    def absmax(self, shape: Shape) -> NamedSharding | None:
        """Of the absmax of an 8-bit state of some shape."""
        split = self.part(shape)
        return split and absmax_sharding(split, shape, self._plan.block_size)


def absmax_sharding(parameter: NamedSharding, shape: Shape, block_size: int | None) -> NamedSharding:
    """How the absmax of an array of the given shape is split, if the array is split as `parameter` says."""
    entries = _entries(parameter, shape)
    if block_size is None or not shape:
        entries = []
    elif shape[-1] % block_size == 0:
        entries[-1] = _even_part(entries[-1], shape[-1] // block_size, parameter)
    else:
        # Blocks that run over the ends of rows are split along the first axis, if its parts are whole blocks.
        (blocks,) = absmax_shape(shape, block_size)
        entries = [_even_part(entries[0], blocks, parameter)] if math.prod(shape) % block_size == 0 else []
    return NamedSharding(parameter.mesh, PartitionSpec(*entries))


def cuts_evenly(entry: Any, length: int, sharding: NamedSharding) -> bool:
    """Whether an entry of a PartitionSpec cuts an axis of some length into equal parts."""
    return length % parts(entry, sharding.mesh) == 0


def _even_part(entry: Any, length: int, sharding: NamedSharding) -> Any:
    """As much of an entry of a PartitionSpec, from its first mesh axis on, as cuts an axis of some length evenly."""
    if not isinstance(entry, tuple):
        return entry if cuts_evenly(entry, length, sharding) else None
    while entry and not cuts_evenly(entry, length, sharding):
        entry = entry[:-1]
    return entry or None


def blocks_are_whole(sharding: NamedSharding, shape: Shape, block_size: int | None) -> bool:
    """Whether no border between devices cuts a block of `block_size` elements."""
    entries = _entries(sharding, shape)
    if not any(parts(entry, sharding.mesh) > 1 for entry in entries):
        return True
    if block_size is None:
        return False
    if shape[-1] % block_size == 0:
        return cuts_evenly(entries[-1], shape[-1] // block_size, sharding)
    others = any(parts(entry, sharding.mesh) > 1 for entry in entries[1:])
    return not others and math.prod(shape) % (block_size * parts(entries[0], sharding.mesh)) == 0


def _entries(sharding: NamedSharding, shape: Shape) -> list[Any]:
    spec = tuple(sharding.spec)
    return [*spec, *[None] * (len(shape) - len(spec))]
