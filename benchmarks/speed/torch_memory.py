"""What an optimizer of torch holds on a CPU: its state, what it keeps beside it, what a step needs meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def held_bytes() -> int:
    """Of all tensors that live, a shared storage counted once."""
    gc.collect()
    # By type: an instance may be a proxy that answers `isinstance` with work.
    return _bytes(x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def state_bytes(optimizer: Any) -> int:
    """Of every tensor in an optimizer's state, those inside of tensor subclasses too."""
    return _bytes(_tensors(list(optimizer.state.values())))


def peak_of(step: Callable[[], Any]) -> int:
    """The most that a step holds beyond what was there before, in bytes, as torch's allocator tells."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    found = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        # A subclass around tensors: its own storage is empty.
        if hasattr(value, "__tensor_flatten__"):
            yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _bytes(tensors: Iterator[torch.Tensor]) -> int:
    found = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, NotImplementedError):  # without a storage: fake, or a wrapper of others
            continue
    found.pop(0, None)
    return sum(found.values())
