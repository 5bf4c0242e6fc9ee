"""Stage 1, `clip_by_percentile` (section 4): a gradient norm far above the usual ones is brought down to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core.config.constants import NORM_HISTORY


def clip_by_percentile(
    grads: Sequence[Tensor], norm_history: Tensor, norm_position: Tensor, *, percentile: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Scales gradients down together when their norm is above a percentile of the last 100 norms (section 4).

    Args:
        grads: float32 on one device, of any shapes; a batch is no different, since n² is summed over everything.
        norm_history: float32, (100,), the last values of n²; zeros before the first.
        norm_position: int32, 0-d, the index that the next value overwrites.
        percentile: P in [1, 99]: the threshold is entry P of the sorted history, this n² included.

    Returns:
        The gradients, and the new history and position.  n² of 0 is not recorded; neither is one that is not finite,
        which stands for an array to be skipped.  Then nothing is clipped.
    """
    square_norm = total([torch.linalg.vector_norm(g).square() for g in grads], norm_history.device)
    history, position = recorded(square_norm, norm_history, norm_position)
    factor = clipping_factor(square_norm, history, percentile)
    return [g * factor for g in grads], history, position


def total(square_norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """n² over all arrays: 0-d float32 on `device`, 0 for no array."""
    return torch.stack(list(square_norms)).sum() if square_norms else torch.zeros((), device=device)


def recorded(square_norm: Tensor, norm_history: Tensor, norm_position: Tensor) -> tuple[Tensor, Tensor]:
    """The history and the position after one value of n².

    Args:
        square_norm: n², 0-d float32; 0, infinite or NaN is not recorded.
        norm_history, norm_position: as in `clip_by_percentile`.
    """
    # Values that are recorded are positive, so a zero anywhere means that there was none.
    places = torch.arange(NORM_HISTORY, dtype=torch.int32, device=norm_history.device)
    here = (places == norm_position) | (norm_history == 0)
    takes_part = is_recorded(square_norm)
    history = torch.where(here & takes_part, square_norm, norm_history)
    return history, torch.where(takes_part, (norm_position + 1) % NORM_HISTORY, norm_position)


def clipping_factor(square_norm: Tensor, norm_history: Tensor, percentile: int) -> Tensor:
    """√(threshold² / n²) where n² is above threshold², else 1; 0-d float32.

    Args:
        square_norm: n², 0-d float32.
        norm_history: with this n² in it, if it is recorded.
        percentile: P.
    """
    threshold = norm_history.sort().values[percentile]
    clips = is_recorded(square_norm) & (square_norm > threshold)
    return torch.where(clips, (threshold / square_norm).sqrt(), 1.0)


def is_recorded(square_norm: Tensor) -> Tensor:
    """0-d bool."""
    return square_norm.isfinite() & (square_norm > 0)
