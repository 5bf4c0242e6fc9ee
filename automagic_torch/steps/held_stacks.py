"""Keeps the states of a batch stacked from one compiled step to the next.

Then a step neither stacks the states of many small arrays nor copies them back: on a GPU these calls took most of a
step's time (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

from torch import Tensor

from automagic_torch.arrays.stacked import separate
from automagic_torch.cameamp.call import Batch
from automagic_torch.codec.stored import States
from automagic_torch.sharding.extent import Extent


class Stack(NamedTuple):
    """The states of a batch: stacked, and the part of each array by the state's name."""

    whole: States
    parts: dict[str, tuple[Tensor, ...]]
    states: list[States]


class HeldStacks:
    """The stacks of an optimizer.  The states of its arrays are views of them until `separate` is called."""

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._used: set[tuple[int, ...]] = set()

    def of(self, batch: Batch) -> States | None:
        """The stacked states of a batch; None unless they are those of the last step and nobody else's."""
        stack = self._stacks.get(_key(batch))
        if stack is None or not batch.in_place or stack.whole.keys() != batch.names:
            return None
        for name, parts in stack.parts.items():
            if not all(map(is_, parts, [state[name] for state in batch.states])):
                return None
        # Whoever moves states to another device and back by `x.data = ...` moves this one too.
        if not all(_lie_in(stack.whole["exp_avg"], stack.parts["exp_avg"])):
            return None
        return stack.whole

    def keep(self, batch: Batch) -> None:
        """Keeps the stack of a batch for the next step."""
        self._used.add(_key(batch))

    def hold(self, batch: Batch, whole: States) -> None:
        """Makes the states of a batch views of `whole`, which nobody else holds."""
        parts = {name: tensor.unbind() for name, tensor in whole.items()}
        for name, tensors in parts.items():
            for state, tensor in zip(batch.states, tensors, strict=True):
                state[name] = tensor
        self._stacks[_key(batch)] = Stack(whole, parts, batch.states)
        self.keep(batch)

    def drop_unused(self) -> None:
        """At the end of a step: stacks of batches that were not formed again are let go."""
        for key in self._stacks.keys() - self._used:
            _separate(self._stacks.pop(key))
        self._used = set()

    def separate(self) -> None:
        """Gives each state memory of its own again, so that saving one saves no other."""
        for stack in self._stacks.values():
            _separate(stack)
        self._stacks = {}


def can_hold(batch: Batch) -> bool:
    """Whether the states of a batch are several, and whole on the device of their parameters."""
    return len(batch.states) > 1 and type(batch.extent) is Extent and batch.extent.state_device is None


def _separate(stack: Stack) -> None:
    for name, parts in stack.parts.items():
        still = [
            (state, i)
            for i, (state, part, here) in enumerate(
                zip(stack.states, parts, _lie_in(stack.whole[name], parts), strict=True)
            )
            if here and state.get(name) is part
        ]
        if still:
            own = separate(stack.whole[name])
            for state, i in still:
                state[name] = own[i]


def _lie_in(whole: Tensor, parts: Sequence[Tensor]) -> list[bool]:
    """Which parts of a stack are where they were: ``part.data = x`` puts another memory under a tensor."""
    start, step = whole.data_ptr(), whole[0].nbytes
    return [part.data_ptr() == start + i * step for i, part in enumerate(parts)]


def _key(batch: Batch) -> tuple[int, ...]:
    return tuple(map(id, batch.params))
