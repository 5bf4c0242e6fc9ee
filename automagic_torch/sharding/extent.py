"""What of a batch's arrays this process holds, and where their states are kept.

The rest of the optimizer works on stacked arrays.  Only here does it matter whether these are whole arrays or shards
of arrays that several processes hold together, which `automagic_torch.sharding` adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_torch.arrays.dtensors import whole
from automagic_torch.arrays.host_memory import on_device, on_host
from automagic_torch.arrays.means import Means
from automagic_torch.arrays.stacked import chosen, separate
from automagic_torch.codec import polarity
from automagic_torch.codec.stored import States, encoded_states, read_states, state_forms
from automagic_torch.stages.chain import StageInputs, after_stages
from automagic_torch.stages.energy import StageEnergy


class Extent:
    """All of every array is here.

    Attributes:
        plan: of the whole arrays.
        means: over rows, columns and arrays.
        state_device: where states are kept, None for the device of their parameter.
        first: row-major index, in the whole array, of the first element that is here.
        spread: other processes hold parts of the arrays too.
    """

    first = 0
    spread = False

    def __init__(self, plan: StatePlan, state_device: torch.device | None = None) -> None:
        self.plan = plan
        self.state_device = state_device
        self.means = Means(plan)

    def new_state(self, warming: bool, device: torch.device) -> States:
        """The state of one array before its first step: zeros, except `torque_mean`, which is 1."""
        state = self.zeros(state_forms(self.plan, warming), device)
        state["torque_mean"].fill_(1.0)
        return state

    def zeros(self, names: Iterable[str], device: torch.device) -> States:
        """Some states of one array, as they are kept, all zero.

        Args:
            names: of states.
            device: of the parameter.
        """
        forms = state_forms(self.plan, warming=True)
        return {
            name: torch.zeros(forms[name].shape, dtype=forms[name].dtype, device=self.state_device or device)
            for name in names
        }

    def placed(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """A copy of one state of one array, wherever it comes from, as it is kept here.

        Args:
            name: of the state.
            value: of the state's whole shape; a DTensor of any placements, or a whole tensor.
            device: of the parameter.
        """
        return self._copied(whole(value), device)

    def adopted(self, state: States, device: torch.device) -> States:
        """A whole state that was made here for one array, as it is kept; what need not be copied is not."""
        return state if self.state_device is None else {name: self.placed(name, x, device) for name, x in state.items()}

    def _copied(self, value: Tensor, device: torch.device) -> Tensor:
        copied = value.detach().to(self.state_device or device, copy=True, memory_format=torch.contiguous_format)
        # Pinned from the start, so that the first step does not wait for its copies.
        return copied.pin_memory() if self.state_device is not None and device.type == "cuda" else copied

    def elements_computed(self, arrays: StageInputs) -> int:
        """How many elements of one array a step computes with here, the same in every process."""
        return self.plan.size

    def here(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The parts of parameters, gradients or states that are here; not copied."""
        return tensors

    def states_here(self, states: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
        """As `here`, of states, on the device of their parameters."""
        there = self.here(states)
        return there if self.state_device is None else on_device(there, device)

    def gradients_here(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `here`, of gradients."""
        return grads

    def read(self, stored: States) -> States:
        """Stacked states in float32: `automagic_torch.codec.stored.read_states`."""
        return read_states(stored, self.plan)

    def encoded(self, new: States, key: Callable[[Slot], int] | None) -> States:
        """New values in the form that is stored: `automagic_torch.codec.stored.encoded_states`."""
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
        """Gives every array its part of a fresh stacked tensor.

        Tensors are replaced, not written into, so that an earlier `state_dict` keeps its values.
        """
        for state, tensor in zip(states, separate(value), strict=True):
            state[name] = self.kept(name, tensor)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """One state of one array as it is kept between steps."""
        return tensor if self.state_device is None else on_host(tensor)

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
        self,
        arrays: StageInputs,
        factor: Tensor | None,
        g: Tensor,
        w: Tensor,
        old: States,
        age: Tensor,
        energy: StageEnergy,
    ) -> tuple[Tensor, States]:
        """Section 4: `automagic_torch.stages.chain.after_stages`."""
        return after_stages(arrays, factor, g, w, old, age, energy, self.means)


def whole_state(state: States, device: torch.device) -> States:
    """All of the state of one array, on a device; gathers as `whole` does."""
    return {name: whole(value).to(device) for name, value in state.items()}
