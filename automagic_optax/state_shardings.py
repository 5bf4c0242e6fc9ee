"""How the states of an array are split over a mesh: as their parameter is, along every axis that they share.

A state that is shorter than its parameter along an axis (scales, one for each block; sign bits, one byte for eight) is
split there only where every part of the parameter has whole blocks or whole bytes; else it is whole on every device.
"""

from __future__ import annotations

import math
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from automagic_core import StatePlan
from automagic_core.layout import Shape
from automagic_optax.placement import parts, statistic_sharding


class StateShardings:
    """The shardings of one array's states.

    Args:
        parameter: how the parameter is split; None where nothing is known, and then every sharding is None.
        plan: the array's states.
    """

    def __init__(self, parameter: NamedSharding | None, plan: StatePlan) -> None:
        self._parameter = parameter
        self._plan = plan
        spec = () if parameter is None else tuple(parameter.spec)
        self._entries: list[Any] = [*spec, *[None] * (len(plan.shape) - len(spec))]

    @property
    def elementwise(self) -> NamedSharding | None:
        """Of what has one value for each element."""
        return self._parameter

    @property
    def scalar(self) -> NamedSharding | None:
        """Whole on every device."""
        return self._named([])

    @property
    def absmax(self) -> NamedSharding | None:
        """Of the scales of a quantized state."""
        shape, scales = self._plan.shape, self._plan.absmax_shape
        if self._parameter is None or self._plan.block_size is None:
            return self.scalar
        if len(scales) == len(shape) and shape[-1] % self._plan.block_size == 0:
            return self._named([*self._entries[:-1], self._if_whole(self._entries[-1], scales[-1])])
        return self._named([self._flat_entry(scales[0])])

    @property
    def polarity(self) -> NamedSharding | None:
        """Of the packed sign bits."""
        if self._parameter is None or not self._plan.shape:
            return self.scalar
        whole_bytes = self._plan.shape[-1] % 8 == 0
        last = self._if_whole(self._entries[-1], self._plan.polarity_shape[-1]) if whole_bytes else None
        return self._named([*self._entries[:-1], last])

    def statistic(self, shape: Shape) -> NamedSharding | None:
        """Of a row or column statistic of the given shape."""
        return self._parameter and statistic_sharding(self._parameter, self._plan.shape, shape)

    def _named(self, entries: list[Any]) -> NamedSharding | None:
        if self._parameter is None:
            return None
        return NamedSharding(self._parameter.mesh, PartitionSpec(*entries))

    def _if_whole(self, entry: Any, length: int) -> Any:
        assert self._parameter is not None
        return entry if length % parts(entry, self._parameter.mesh) == 0 else None

    def _flat_entry(self, blocks: int) -> Any:
        """Blocks that run over the ends of rows follow the first axis, where its parts hold whole blocks."""
        shape, block_size = self._plan.shape, self._plan.block_size
        if self._parameter is None or block_size is None or not shape or any(self._entries[1:]):
            return None
        size = math.prod(shape)
        cut = parts(self._entries[0], self._parameter.mesh)
        return self._entries[0] if size % (block_size * cut) == 0 and blocks % cut == 0 else None
