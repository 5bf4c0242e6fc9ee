"""The part of a batch that this process holds, and where its states are kept (docs/algorithm.md, section 9.1).

The rest of the optimizer works on stacked arrays.  It need not know whether these are whole arrays (`Extent`) or
pieces of arrays that several processes hold together (`ShardedExtent`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_core.arrays.state_forms import coded_shapes, own_states
from automagic_torch.arrays.dtensors import whole
from automagic_torch.arrays.host_memory import on_device, on_host
from automagic_torch.arrays.means import Means
from automagic_torch.arrays.stacked import chosen, separate
from automagic_torch.codec.stored import Key, States, encoded_states, read_states, state_forms
from automagic_torch.stages.chain import StageArrays, StageInputs, after_stages
from automagic_torch.stages.energy import StageEnergy


class Extent:
    """This process holds all of every array.

    Attributes:
        plan: plan of the whole arrays.
        coded: the shapes of their codes.
        means: forms means over rows, columns and arrays.
        state_device: the device of the states; None for that of their parameter.
        first: row-major index, in the whole array, of the first element that this process holds.
        spread: other processes hold pieces of the arrays too.
    """

    first = 0
    spread = False

    def __init__(self, plan: StatePlan, state_device: torch.device | None = None) -> None:
        self.plan = plan
        self.coded = coded_shapes(plan)
        self.state_device = state_device
        self.means = Means(plan)

    def new_state(self, warming: bool, device: torch.device) -> States:
        """The states of one array before its first step: zeros, except `torque_mean`, which is 1."""
        state = self.zeros(state_forms(self.plan, warming), device)
        state["torque_mean"].fill_(1.0)
        return state

    def zeros(self, names: Iterable[str], device: torch.device) -> States:
        """Makes some states of one array, all zero.

        Args:
            names: of the states.
            device: device of the parameter.
        """
        forms = state_forms(self.plan, warming=True)
        return {
            name: torch.zeros(forms[name].shape, dtype=forms[name].dtype, device=self.state_device or device)
            for name in names
        }

    def placed(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """Copies one state of one array to where it is kept.

        Args:
            name: of the state.
            value: the whole state, as a DTensor of any placements or as a plain tensor.
            device: device of the parameter.
        """
        return self._copied(whole(value), device)

    def adopted(self, state: States, device: torch.device) -> States:
        """Puts the new states of one array where they are kept, without copying more than needed."""
        return state if self.state_device is None else {name: self.placed(name, x, device) for name, x in state.items()}

    def beside(self, state: States, device: torch.device) -> States:
        """The states of one array on its parameter's device, which may have moved since the last step."""
        if self.state_device is not None or state["age"].device == device:
            return state
        return state | {name: self.placed(name, value, device) for name, value in own_states(state).items()}

    def _copied(self, value: Tensor, device: torch.device) -> Tensor:
        copied = value.detach().to(self.state_device or device, copy=True, memory_format=torch.contiguous_format)
        # Pinned now, so that the first step does not wait for its copies.
        return copied.pin_memory() if self.state_device is not None and device.type == "cuda" else copied

    def elements_computed(self, arrays: StageArrays) -> int:
        """How many elements of one array this process computes with; the same in every process."""
        return self.plan.size

    def here(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The pieces of tensors that this process holds; not copied."""
        return tensors

    def states_here(self, states: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
        """As `here`, for states, which it brings to the device of their parameters."""
        there = self.here(states)
        return there if self.state_device is None else on_device(there, device)

    def gradients_here(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """As `here`, for gradients."""
        return grads

    def read(self, stored: States) -> States:
        """Reads stacked states as float32: `automagic_torch.codec.stored.read_states`."""
        return read_states(stored, self.plan)

    def encoded(self, new: States, key: Key | None) -> States:
        """Brings new values into their stored form: `automagic_torch.codec.stored.encoded_states`."""
        return encoded_states(new, self.coded, self.plan.block_size, key)

    def write(self, states: Sequence[States], stored: States, new: States, ok: Tensor, key: Key | None) -> None:
        """Stores new values in the form that the states have.

        Args:
            states: the states of each array, whose entries are replaced.
            stored: the old states, stacked.
            new: the states that change, as `read` gives them.
            ok: (arrays,) bool; where it is False, an array keeps every bit.
            key: gives the keys of the random bits; None rounds to nearest.
        """
        for name, tensor in self.encoded(new, key).items():
            self.replace(states, name, chosen(ok, tensor, stored[name]))

    def replace(self, states: Sequence[States], name: str, value: Tensor) -> None:
        """Replaces one state of every array by its part of a new stacked tensor.

        No tensor is written into, so an earlier `state_dict` keeps its values.
        """
        for state, tensor in zip(states, separate(value), strict=True):
            state[name] = self.kept(name, tensor)

    def kept(self, name: str, tensor: Tensor) -> Tensor:
        """Brings one state of one array to where it is kept between steps."""
        return tensor if self.state_device is None else on_host(tensor)

    def like_parameters(self, x: Tensor) -> Sequence[Tensor]:
        """Makes one tensor for each parameter from a stacked one."""
        return x.unbind()

    def after_stages(self, arrays: StageArrays, inputs: StageInputs, energy: StageEnergy) -> tuple[Tensor, States]:
        """Applies the gradient stages: `automagic_torch.stages.chain.after_stages`."""
        return after_stages(arrays, inputs, energy, self.means)


def whole_state(state: States, device: torch.device) -> States:
    """The whole states of one array on a device; gathers as `whole` does."""
    return {name: whole(value).to(device) for name, value in state.items()}
