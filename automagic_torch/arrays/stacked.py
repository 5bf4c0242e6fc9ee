"""Stacks and separates the arrays of a batch (docs/algorithm.md, section 8).

Axis 0 of a stacked tensor counts the arrays, the others are the axes of one array.  A scalar of every array has shape
(arrays, 1, …, 1), so that it broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORTH_WIDENING = 2**13
"""`chosen` reads arrays of at least so many bytes as int64: `torch.where` is faster with fewer elements."""


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors along a new leading axis; the result is contiguous.  A single contiguous one is not copied."""
    together = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
    return together.contiguous().resolve_neg()


def separate(x: Tensor) -> Sequence[Tensor]:
    """The arrays of a new stacked tensor, each with its own memory, so that saving one saves no other."""
    x = x.contiguous()
    if len(x) == 1:
        return [x.squeeze(0)]
    if not x.is_cuda:
        return torch.unbind_copy(x)  # type: ignore[func-returns-value, return-value]  # the stub says None
    # On CUDA each of these copies would be a launch.
    views = x.unbind()
    copies = [torch.empty_like(view) for view in views]
    torch._foreach_copy_(copies, views)
    return copies


def filled_up(x: Tensor, count: int, value: float) -> Tensor:
    """Stacked tensors as `count` of them: x itself, or a copy in which those that x lacks are full of `value`."""
    if len(x) == count:
        return x
    return torch.cat([x, torch.full_like(x[:1], value).expand(count - len(x), *x.shape[1:])])


def spread(per_array: Tensor, like: Tensor) -> Tensor:
    """(arrays,) → (arrays, 1, …, 1) with as many axes as `like`."""
    return per_array.view(-1, *[1] * (like.ndim - 1))


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where ok is True, else `old`, bit for bit; contiguous.

    Args:
        ok: (arrays,) bool.
        new, old: of one shape and dtype.
    """
    if torch.compiler.is_compiling():
        if new.dtype == torch.uint8:  # of which vector code chooses slowly
            return torch.where(spread(ok, new), new.int(), old.int()).to(torch.uint8)
        return torch.where(spread(ok, new), new, old)
    nbytes = new.nbytes // len(new)
    # A view may begin anywhere.
    aligned = all(x.storage_offset() * x.element_size() % 8 == 0 for x in (new, old))
    if not aligned or nbytes % 8 != 0 or nbytes < WORTH_WIDENING:
        return torch.where(spread(ok, new), new, old).contiguous()
    wide_new, wide_old = (x.contiguous().view(len(ok), -1).view(torch.int64) for x in (new, old))
    return torch.where(ok[:, None], wide_new, wide_old).view(new.dtype).view(new.shape)


def square_norm(g: Tensor) -> Tensor:
    """Σ g², 0-d."""
    norm: Tensor = torch.linalg.vector_norm(g)
    return norm.square()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies x to the device.  The host waits only for a copy to itself, which it would otherwise read too early."""
    return x.to(device, non_blocking=device.type != "cpu")
