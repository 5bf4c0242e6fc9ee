"""Stage 1: scales down gradients whose norm is far above the recent ones (docs/algorithm.md, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core.config.constants import NORM_HISTORY


def clip_by_percentile(
    grads: Sequence[Tensor], norm_history: Tensor, norm_position: Tensor, *, percentile: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scales gradients down together when their norm is above a percentile of the last 100 norms.

    Args:
        grads: float32 gradients of any shapes on one device; each may be a batch.
        norm_history: float32, (100,), the last values of n²; zeros before the first.
        norm_position: int32, 0-d, the index that the next value overwrites.
        percentile: P in [1, 99]: the threshold is entry P of the sorted history, this n² included.

    Returns:
        The gradients, and the new history and position.  If n² is 0 or not finite, which means a skipped array, nothing
        is recorded and nothing is clipped.
    """
    square_norm = total([torch.linalg.vector_norm(g).square() for g in grads], norm_history.device)
    history, position = recorded(square_norm, norm_history, norm_position)
    factor = clipping_factor(square_norm, history, percentile)
    return [g * factor for g in grads], history, position


def total(square_norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """n² over all arrays, 0-d float32 on `device`; 0 if there are none."""
    return torch.stack(list(square_norms)).sum() if square_norms else torch.zeros((), device=device)


def recorded(square_norm: Tensor, norm_history: Tensor, norm_position: Tensor) -> tuple[Tensor, Tensor]:
    """The history and the position after one value of n².

    Args:
        square_norm: n², 0-d float32; 0, infinite or NaN is not recorded.
        norm_history, norm_position: as in `clip_by_percentile`.
    """
    # Recorded values are positive, so zeros mean that nothing was recorded yet.
    index = torch.arange(NORM_HISTORY, dtype=torch.int32, device=norm_history.device)
    here = (index == norm_position) | (norm_history == 0)
    takes_part = is_recorded(square_norm)
    history = torch.where(here & takes_part, square_norm, norm_history)
    return history, torch.where(takes_part, (norm_position + 1) % NORM_HISTORY, norm_position)


def clipping_factor(square_norm: Tensor, norm_history: Tensor, percentile: int) -> Tensor:
    """√(threshold² / n²) where n² is above threshold², else 1; 0-d float32.

    Args:
        square_norm: n², 0-d float32.
        norm_history: the history, which includes this n² if it is recorded.
        percentile: P.
    """
    threshold = norm_history.sort().values[percentile]
    clips = is_recorded(square_norm) & (square_norm > threshold)
    return torch.where(clips, (threshold / square_norm).sqrt(), 1.0)


def is_recorded(square_norm: Tensor) -> Tensor:
    """Whether n² is recorded, 0-d bool."""
    return square_norm.isfinite() & (square_norm > 0)
