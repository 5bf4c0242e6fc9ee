"""Decides which arrays are stacked into one batch, and how many (docs/algorithm.md, section 8)."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_core.arrays.evenly import evenly
from automagic_core.arrays.group_keys import LAYOUT
from automagic_core.arrays.state_forms import WARM_UP_ONLY, own_states
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.arrays.freed_memory import keep_freed_memory
from automagic_torch.arrays.marks import is_embedding, is_lora
from automagic_torch.cameamp.call import Batch, Call
from automagic_torch.cameamp.groups import can_store_8bit, parameter_name, plan_of
from automagic_torch.codec.stored import States, state_forms
from automagic_torch.sharding.extent import Extent
from automagic_torch.sharding.extent_of import extent_of
from automagic_torch.stages.chain import StageArrays

Place = tuple[Tensor, int]
"""A parameter and its number in its group."""

ARRAY_LIMIT = {"cpu": 2**16, "other": 2**20}
"""Arrays with more elements go alone.

Measured on a CPU with 32-bit states and all stages: arrays of 2¹², 2¹⁴, 2¹⁶ and 2¹⁷ elements took 60, 52, 52 and 53 ns
per element in batches, and 394, 129, 60 and 53 ns alone.  The limit of other devices is an estimate: an operation on
fewer than about 2²⁰ elements should take no longer than its launch.
"""

BATCH_LIMIT = {"cpu": 2**20, "other": 3 * 2**21}
"""The most elements of a batch, which needs 50 to 60 bytes of temporary memory for each.

On a CPU that is as much as the C library keeps from step to step (`keep_freed_memory`): 1,000 adapters, compiled, took
160 ms a step, with everything on 460, and in batches of 3 · 2²¹ elements 320 to 370 and 690.  Other devices keep all
that is freed, and the more a batch holds, the fewer launches they need.
"""


def kind(p: Tensor) -> Hashable:
    """The kind of an array: arrays of one group and one kind form batches.  p has a gradient."""
    assert p.grad is not None
    return p.shape, p.dtype, p.grad.dtype, p.device, is_embedding(p), is_lora(p), _processes(p)


def agree_on_gradients(batches: Sequence[Batch]) -> None:
    """Makes the processes that hold arrays together agree on their gradients."""
    spread = [batch for batch in batches if batch.extent.spread]
    if spread:
        # Imported only where arrays are spread.
        from automagic_torch.cameamp import agreement

        agreement.agree_on_gradients(spread)


def agree_on_presence(groups: Sequence[Mapping[str, Any]], agreed: dict[int, list[bool]]) -> None:
    """Raises a RuntimeError if only some of the processes that hold an array have a gradient of it.

    Args:
        groups: the optimizer's groups.
        agreed: kept for the next call.
    """
    if any(is_dtensor(p) for group in groups for p in group["params"]):
        from automagic_torch.cameamp import presence

        presence.agree_on_presence(groups, agreed)


def _processes(p: Tensor) -> Hashable:
    """The processes that hold p, and its placements; None for a plain tensor."""
    return (p.device_mesh, p.placements) if is_dtensor(p) else None


def arrays_in_batch(size: int, device: torch.device) -> int:
    """How many arrays of `size` elements a batch can hold, at least 1."""
    where = "cpu" if device.type == "cpu" else "other"
    return 1 if size > ARRAY_LIMIT[where] else max(1, BATCH_LIMIT[where] // size)


def new_batches(
    call: Call, alike: Sequence[Place], state_device: torch.device | None
) -> list[tuple[Batch, Sequence[Place]]]:
    """Empty batches for arrays of one kind, and the arrays of each.

    Arrays whose memory overlaps or interleaves, as after ``b.data = a.data``, go into different batches.  Otherwise all
    but the last have equally many, since a compiled function computes as many at a time as its first batch has.

    Args:
        call: of their group.
        alike: the arrays.
        state_device: where the states are; None for the parameters' device.
    """
    p = alike[0][0]
    if p.device.type == "cpu":
        keep_freed_memory()
    layout = call.group[LAYOUT]
    plan = plan_of(p, call.config, layout, eight_bit=can_store_8bit(p, call.config))
    extent = extent_of(p, plan, state_device)
    arrays = StageArrays(plan, call.config, layout, is_embedding(p), is_lora(p))
    forms = state_forms(plan, call.warming)
    most = arrays_in_batch(extent.elements_computed(arrays), p.device)
    several = [alike] if min(most, len(alike)) == 1 else _without_shared_memory(alike, extent)
    return [(Batch(call, extent, forms, arrays), part) for some in several for part in evenly(some, most)]


def _without_shared_memory(alike: Sequence[Place], extent: Extent) -> Sequence[Sequence[Place]]:
    """Lists of the arrays in which no two overlap: a batch reads all of its arrays before it writes one."""
    if extent.spread:  # all processes must form the same batches, and each knows of its own memory only
        return [alike]
    pieces = extent.here([p for p, _ in alike])
    if pieces[0].untyped_storage().device.type == "meta":  # so has a fake tensor, whose address one must not ask for
        return [alike]
    nbytes = max(map(_stretch, pieces))
    starts = [x.data_ptr() for x in pieces]
    in_order = sorted(starts)
    if min(map(operator.sub, in_order[1:], in_order), default=nbytes) >= nbytes:
        return [alike]
    ends: list[int] = []  # of the memory in each list so far
    lists: list[list[int]] = []
    for start, number in sorted(zip(starts, range(len(starts)), strict=True)):
        which = next((k for k, end in enumerate(ends) if end <= start), len(ends))
        if which == len(ends):
            ends.append(0)
            lists.append([])
        ends[which] = start and start + nbytes  # 0 where a class of tensors has no memory of its own
        lists[which].append(number)
    return [[alike[number] for number in sorted(numbers)] for numbers in lists]


def _stretch(x: Tensor) -> int:
    """The bytes from the first element to the end of the last."""
    if x.is_contiguous():
        return x.nbytes
    return x.element_size() * (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))


def refuse_replaced(batch: Batch, group_index: int, indices: Sequence[int]) -> None:
    """Raises a RuntimeError that names the first state of another shape or dtype than its parameter and fields ask for.

    Looking at 1,000 arrays takes 3 ms, so stacks that the last step left are not looked at.

    Args:
        batch: a whole batch; each of its arrays has states of the right names.
        group_index, indices: name its parameters in the message.
    """
    for name, form in batch.forms.items():
        for state, index in zip(batch.states, indices, strict=True):
            x = state[name]
            if x.shape != form.shape or x.dtype != form.dtype:
                p = parameter_name(batch.call.group, group_index, index)
                raise RuntimeError(
                    f"the state {name!r} of {p} has shape {tuple(x.shape)} and {x.dtype}, and its group's fields ask "
                    f"for {form.shape} and {form.dtype}: fields that decide which states there are cannot change after "
                    "the first step (load_requantized goes on with others), and what was replaced must be as it was"
                )


def of_this_group(state: States, batch: Batch, device: torch.device) -> States:
    """The states of an array, which may have come from another group.

    A group that searches adds what only the search needs.  A group whose search is over drops it.  Any other difference
    stays, for `refuse_misfit`.

    Args:
        state: of the array, entries of others included.
        batch: of its kind, in its group.
        device: of the parameter.

    Returns:
        `state` itself where nothing differs.
    """
    if state.keys() == batch.names:
        return state
    here = own_states(state).keys()
    if not here ^ batch.names <= set(WARM_UP_ONLY):
        return state
    if batch.call.warming and here < batch.names:
        return state | batch.extent.zeros(batch.names - here, device)
    if not batch.call.warming and here > batch.names:
        return {name: value for name, value in state.items() if name not in WARM_UP_ONLY}
    return state
