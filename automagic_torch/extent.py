"""What of a batch's arrays this process holds, and where their states are kept.

The rest of the optimizer works on stacked arrays.  Only here does it matter whether these are whole arrays or shards
of arrays that several processes hold together, which `automagic_torch.sharded` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_torch import polarity
from automagic_torch.means import Means
from automagic_torch.stacked import chosen
from automagic_torch.stages.chain import after_stages
from automagic_torch.stages.energy import StageEnergy
from automagic_torch.states import States, encoded_states, new_state, read_states, replace

if TYPE_CHECKING:
    from automagic_torch.call import Batch


class Extent:
    """All of every array is here.

    Attributes:
        plan: of the whole arrays.
        means: over rows, columns and arrays.
        first: row-major index, in the whole array, of the first element that is here.
        spread: other processes hold parts of the arrays too.
    """

    first = 0
    spread = False

    def __init__(self, plan: StatePlan) -> None:
        self.plan = plan
        self.means = Means(plan)

    def new_state(self, warming: bool, device: torch.device) -> States:
        """The state of one array before its first step."""
        return new_state(self.plan, warming, device)

    def placed(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """A copy of one state of one array, wherever it comes from, as it is kept here.

        Args:
            name: of the state.
            value: of the state's whole shape; a DTensor of any placements, or a whole tensor.
            device: of the parameter.
        """
        return whole(value).detach().to(device, copy=True, memory_format=torch.contiguous_format)

    def here(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts of parameters, gradients or states that are here; not copied."""
        return tensors

    def gradients_here(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `here`, of gradients."""
        return grads

    def read(self, stored: States) -> States:
        """Stacked states in float32: `automagic_torch.states.read_states`."""
        return read_states(stored, self.plan)

    def encoded(self, new: States, key: Callable[[Slot], int] | None) -> States:
        """New values in the form that is stored: `automagic_torch.states.encoded_states`."""
        return encoded_states(new, self.plan, key)

    def write(
        self, states: Sequence[States], stored: States, new: States, ok: Tensor, key: Callable[[Slot], int] | None
    ) -> None:
        """Stores new values in the form that the states have.

        Args:
            states: one for each array, whose entries are replaced.
            stored: the same states as they were, stacked.
            new: as `read` gives them, only those that change.
            ok: (arrays,) bool; False leaves every stored bit of an array.
            key: gives the key of a slot's random bits; None rounds codes to nearest.
        """
        for name, tensor in self.encoded(new, key).items():
            self.replace(states, name, chosen(ok, tensor, stored[name]))

    def replace(self, states: Sequence[States], name: str, value: Tensor) -> None:
        """Gives every array its part of a fresh stacked tensor."""
        replace(states, name, value)

    def like_parameters(self, x: Tensor) -> Sequence[Tensor]:
        """A stacked tensor as one tensor for each parameter."""
        return x.unbind()

    def signs(self, packed: Tensor, g: Tensor) -> Tensor:
        """What `last_polarity` holds, −1 or 1 for every element of g."""
        return polarity.unpack_signs(packed, self.plan.shape[-1] if self.plan.shape else 1).view_as(g)

    def updated_polarity(self, packed: Tensor, g: Tensor) -> Tensor:
        """`last_polarity` after g."""
        return polarity.updated(packed, g)

    def after_stages(
        self, batch: Batch, g: Tensor, w: Tensor, old: States, age: Tensor, energy: StageEnergy
    ) -> tuple[Tensor, States]:
        """Section 4: `automagic_torch.stages.chain.after_stages`."""
        return after_stages(batch, g, w, old, age, energy, self.means)


def extent_of(p: Tensor, plan: StatePlan) -> Extent:
    """What this process holds of a parameter, and of others that are spread alike.

    Raises:
        ValueError: it is a DTensor with placements that are not supported.
    """
    if not is_dtensor(p):
        return Extent(plan)
    from automagic_torch.sharded.extent import ShardedExtent
    from automagic_torch.sharded.split import split_of

    return ShardedExtent(plan, split_of(p))  # type: ignore[arg-type]  # it is a DTensor


def whole(x: Tensor) -> Tensor:
    """All of a tensor: a DTensor is gathered, which every process that holds it must do; others are returned."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def is_dtensor(x: Tensor) -> bool:
    """Whether processes hold it together; does not import what such tensors need."""
    return hasattr(x, "device_mesh")
