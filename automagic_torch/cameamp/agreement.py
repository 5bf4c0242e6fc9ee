"""Before the update all processes agree on which arrays are skipped, and on n² (docs/algorithm.md, section 9.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from automagic_core.config.constants import GRADIENT_LIMIT
from automagic_torch.arrays.stacked import square_norm
from automagic_torch.cameamp.call import Batch
from automagic_torch.sharding.exchange import summed
from automagic_torch.sharding.sharded_extent import ShardedExtent
from automagic_torch.sharding.split import Split


def agree_on_gradients(batches: Iterable[Batch]) -> None:
    """Tells spread batches which arrays are usable in all processes, and their Σ g².

    All arrays that are spread over the same processes share one exchange.
    """
    for split, together in _by_processes(batches):
        parts: list[Tensor] = []
        for batch in together:
            g = batch.raw_gradients()
            parts.append(_too_large(g))
            parts.append(square_norm(g).view(1))
        totals = summed(parts, split)
        for batch, bad, norm in zip(together, totals[::2], totals[1::2], strict=True):
            batch.know(bad == 0, norm[0])


def any_gradient(batches: Iterable[Batch]) -> bool:
    """Whether any process has a gradient that is not zero.  Waits for the device."""
    found = False
    for split, together in _by_processes(batches):
        nonzero = torch.stack([batch.raw_gradients().any() for batch in together]).any()
        found |= bool(summed([nonzero.float().view(1)], split)[0])
    return found


def _by_processes(batches: Iterable[Batch]) -> Sequence[tuple[Split, list[Batch]]]:
    """Groups spread batches by the processes and devices that hold them."""
    groups: dict[object, tuple[Split, list[Batch]]] = {}
    for batch in batches:
        if batch.extent.spread:
            assert isinstance(batch.extent, ShardedExtent)
            split = batch.extent.split
            key = (split.mesh, split.dim, batch.params[0].device)
            groups.setdefault(key, (split, []))[1].append(batch)
    return list(groups.values())


def _too_large(g: Tensor) -> Tensor:
    """(arrays,): 1.0 where an element of this piece is not finite or above the limit, else 0.0."""
    return (~(g.abs() <= GRADIENT_LIMIT)).view(len(g), g[0].numel()).any(1).float()
