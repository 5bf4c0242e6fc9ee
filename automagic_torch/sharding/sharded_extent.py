"""`ShardedExtent`: a batch of which every process holds a piece (docs/algorithm.md, section 9.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from automagic_core import StatePlan
from automagic_core.arrays.state_forms import coded_shapes
from automagic_torch.arrays.dtensors import for_exchange, whole
from automagic_torch.codec.stored import Key, States
from automagic_torch.sharding.blocks import ShardBlocks, encoded_pieces
from automagic_torch.sharding.extent import Extent
from automagic_torch.sharding.sharded_means import ShardedMeans
from automagic_torch.sharding.sharded_stages import sharded_stages, stages_gather
from automagic_torch.sharding.split import (
    Split,
    as_dtensor,
    local_piece,
    piece_shape,
    state_placements,
    state_splits,
)
from automagic_torch.stages.chain import StageArrays, StageInputs
from automagic_torch.stages.energy import StageEnergy


class ShardedExtent(Extent):
    """Every process holds a piece of every array."""

    def __init__(self, plan: StatePlan, split: Split, state_device: torch.device | None = None) -> None:
        super().__init__(plan, state_device)
        self.split = split
        self.first = split.first
        self.spread = split.count > 1
        if self.spread:
            self.means = ShardedMeans(plan, split)
        self._splits = state_splits(split, plan)
        # A statistic that is whole in every process is coded as on one.
        split_names = [name for name in coded_shapes(plan) if self._splits[name].split]
        self._blocks = {name: ShardBlocks(split, plan, name) for name in split_names}

    def zeros(self, names: Iterable[str], device: torch.device) -> States:
        zeros = {}
        for name in names:
            state = self._splits[name]
            local = torch.zeros(piece_shape(state, self.split), dtype=state.dtype, device=self.state_device or device)
            zeros[name] = as_dtensor(local, state, self.split)
        return zeros

    def placed(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        state = self._splits[name]
        if isinstance(value, DTensor) and value.device_mesh == self.split.mesh:
            placements = state_placements(state, self.split)
            value = value if value.placements == placements else for_exchange(value)
            local = value.redistribute(self.split.mesh, placements).to_local()
        else:
            local = local_piece(whole(value), state, self.split)
        return as_dtensor(self._copied(local, device), state, self.split)

    def adopted(self, state: States, device: torch.device) -> States:
        return {name: self.placed(name, value, device) for name, value in state.items()}

    def elements_computed(self, arrays: StageArrays) -> int:
        # The piece counts and not the array: large models then have few batches, and so few exchanges.
        return self.plan.size if stages_gather(arrays) else self.split.borders[1] * self.split.row_size

    def here(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]

    def gradients_here(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.here([self._as_parameter(grad) for grad in grads])

    def _as_parameter(self, grad: Tensor) -> Tensor:
        """The gradient with the placements of its parameter; it may have come as partial sums."""
        if isinstance(grad, DTensor) and grad.placements != self.split.placements:
            return grad.redistribute(self.split.mesh, self.split.placements)
        return grad

    def read(self, stored: States) -> States:
        pieces = {
            name: self._blocks[name].read(x, stored[name + "_absmax"])
            for name, x in stored.items()
            if name in self._blocks
        }
        return super().read({name: x for name, x in stored.items() if name not in pieces}) | pieces

    def encoded(self, new: States, key: Key | None) -> States:
        others = {name: x for name, x in new.items() if name not in self._blocks}
        pieces = {name: (self._blocks[name], x) for name, x in new.items() if name in self._blocks}
        return encoded_pieces(pieces, self.split, key) | super().encoded(others, key)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        return as_dtensor(super().kept(name, tensor), self._splits[name], self.split)

    def like_parameters(self, x: Tensor) -> Sequence[Tensor]:
        return [as_dtensor(local, self._splits["exp_avg"], self.split) for local in x.unbind()]

    def after_stages(self, arrays: StageArrays, inputs: StageInputs, energy: StageEnergy) -> tuple[Tensor, States]:
        return sharded_stages(arrays, inputs, energy, self.means, self.split)
