"""Which arrays are computed with as one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.arrays.marks import is_embedding, is_lora
from automagic_torch.cameamp.call import Batch

ARRAY_LIMIT = {"cpu": 2**16, "other": 2**20}
"""Elements above which an array goes alone.

On a CPU, a step with every stage on of 2²⁰ elements in arrays of 2¹², 2¹⁴, 2¹⁶ and 2¹⁷ took 60, 52, 52 and 53 ns
for each in batches and 394, 129, 60 and 53 alone with 32-bit states, 93, 84, 87 and 83 against 618, 213, 119 and 93
with 8-bit ones: from 2¹⁷ on what a batch saves in calls it loses in the cache.  For other devices nothing was measured:
there an operation on fewer than some 2²⁰ elements should take no longer than its launch.
"""

BATCH_LIMIT = 3 * 2**21
"""Elements in a batch, which needs 50 to 60 bytes of temporary memory for each.

A CPU is fastest with fewer: a thousand adapters of 20,480 elements took 1.15 s in batches of 2²⁰ and 1.42 s in one
batch for each shape with 32-bit states, 1.68 and 1.92 s with 8-bit ones (alone 2.6 and 4.6 s).  The limit is higher so
that the number of operations is that of the shapes for a model's adapters.  It stays below 2²³, where a temporary array
reaches 32 MiB and the C library takes fresh pages from the system for it.
"""


def kind(p: Tensor) -> Hashable:
    """What the arrays of one group must have in common to be in one batch; p has a gradient."""
    assert p.grad is not None
    return p.shape, p.dtype, p.grad.dtype, p.device, is_embedding(p), is_lora(p), _processes(p)


def agree_on_gradients(batches: Sequence[Batch]) -> None:
    """Where processes hold arrays together, they find out what each has to know of all gradients."""
    spread = [batch for batch in batches if batch.extent.spread]
    if spread:
        # Imported only where there is somebody to agree with.
        from automagic_torch.cameamp import agreement

        agreement.agree_on_gradients(spread)


def _processes(p: Tensor) -> Hashable:
    """Which processes hold p, and how; None for a plain tensor."""
    return (p.device_mesh, p.placements) if is_dtensor(p) else None  # type: ignore[attr-defined]


def arrays_in_batch(size: int, device: torch.device) -> int:
    """How many arrays of `size` elements a batch takes, at least 1."""
    largest = ARRAY_LIMIT["cpu" if device.type == "cpu" else "other"]
    return 1 if size > largest else max(1, BATCH_LIMIT // size)


def has_room(batch: Batch) -> bool:
    """Whether the batch takes another array."""
    return len(batch.params) < arrays_in_batch(batch.extent.elements_computed(batch.arrays), batch.params[0].device)
