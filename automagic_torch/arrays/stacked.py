"""Stacked arrays: axis 0 counts the arrays of a batch, the others are the axes of one array.

A value that every array has once keeps them with length 1, so that it broadcasts: shape (arrays, 1, …, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORTH_WIDENING = 2**13
"""Bytes of an array from which on it pays to let `torch.where`, which is slow by the element, see few wide ones."""


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and dtype behind a new leading axis, contiguous; a single one is not copied if it is so."""
    together = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
    return together.contiguous()


def separate(x: Tensor) -> Sequence[Tensor]:
    """The arrays of a fresh tensor, each with a storage of its own, so that saving one saves only it."""
    x = x.contiguous()
    if len(x) == 1:
        return [x.squeeze(0)]
    if not x.is_cuda:
        return torch.unbind_copy(x)  # type: ignore[func-returns-value, return-value]  # the stub says None
    # There every copy would be a launch of its own.
    views = x.unbind()
    copies = [torch.empty_like(view) for view in views]
    torch._foreach_copy_(copies, views)
    return copies


def spread(per_array: Tensor, like: Tensor) -> Tensor:
    """(arrays,) → (arrays, 1, …, 1) with as many axes as `like`."""
    return per_array.view(-1, *[1] * (like.ndim - 1))


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` for the arrays that are ok, `old` for the others, bit for bit; contiguous.

    Args:
        ok: (arrays,) bool.
        new, old: of one shape and dtype.
    """
    nbytes = new.nbytes // len(new)
    if nbytes % 8 != 0 or nbytes < WORTH_WIDENING:
        return torch.where(spread(ok, new), new, old).contiguous()
    wide_new, wide_old = (x.contiguous().view(len(ok), -1).view(torch.int64) for x in (new, old))
    return torch.where(ok[:, None], wide_new, wide_old).view(new.dtype).view(new.shape)


def square_norm(g: Tensor) -> Tensor:
    """Σ g², 0-d."""
    return torch.linalg.vector_norm(g).square()


def moved(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without making the host wait where that is safe."""
    # A copy to the host must be waited for: its values would be read too early.
    return x.to(device, non_blocking=device.type != "cpu")
