"""What a state that no saved run has begins with, in an array that has taken steps already."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_core.arrays.bias import weight_seen
from automagic_core.config.constants import EDGE_DECAY, SQUARE_FLOOR
from automagic_core.moving.notes import Notes
from automagic_torch.arrays.means import Means
from automagic_torch.codec import polarity
from automagic_torch.codec.stored import States, state_forms
from automagic_torch.stages.suppress_edges import laplacian

_SQUARES_OF_LAPLACIAN = 20
"""4² for the element itself and 1 for each of four neighbours."""


def row_and_column(x: Tensor, plan: StatePlan) -> tuple[Tensor, Tensor]:
    """Row and column means of one array, `StatePlan.row_shape` and `column_shape`."""
    means = Means(plan)
    return means.rows(x[None])[0], means.columns(x[None])[0]


def product(row: Tensor, column: Tensor) -> Tensor:
    """The array that row and column statistics stand for: R / mean R · C."""
    return row / row.mean().clamp(min=SQUARE_FLOOR) * column


def polarity_of(momentum: Tensor) -> Tensor:
    """`last_polarity` from the momentum: set where it is negative.

    Clear bits would make an array that has taken steps vote against a polarity that it never saw.  The sign of the
    averaged gradients is the best that is known of the last one, and serves for one vote at most.
    """
    bits = (momentum < 0).view(torch.uint8)
    return polarity.pack(bits.reshape(bits.shape or (1,)))


def edge_history_of(v_hat: Tensor, plan: StatePlan, age: int) -> Tensor:
    """`edge_history` as if neighbouring gradients were independent, with variances v̂.

    Zeros would read as gradients without edges and the stage would smooth the next steps too much; real gradients are
    smoother than independent ones, so that this estimate, the larger one, makes it smooth them too little.
    """
    assert plan.spatial_axes is not None, "only arrays with spatial axes have a history"
    variance = laplacian(v_hat, plan.spatial_axes) + _SQUARES_OF_LAPLACIAN * v_hat
    # E |x| of a normal variable is √(2/π) σ.
    usual = Means(plan).rows((variance.clamp(min=0).sqrt() * math.sqrt(2 / math.pi))[None])[0]
    return usual * weight_seen(EDGE_DECAY, age)


def background_of(v_hat: Tensor) -> Tensor:
    """`background_scale`: the mean of √v̂."""
    return v_hat.clamp(min=SQUARE_FLOOR).sqrt().mean()


def with_fresh_states(
    values: States, m: Tensor, v_hat: Tensor, age: int, plan: StatePlan, warming: bool
) -> tuple[States, list[str]]:
    """Completes the float32 values of an array.

    Args:
        values: those that are known; float32, `last_polarity` packed.
        m, v_hat: the momentum up to a factor, and v̂, float32 in the array's shape.
        age: steps that the array took, ≥ 1.
        plan: its states.
        warming: fewer than `warmup_steps` steps are over.

    Returns:
        Every state that the plan has, and the names of those added.
    """
    complete, added = dict(values), []
    for name, form in state_forms(plan, warming).items():
        if name in complete or name.endswith("_absmax"):
            continue
        added.append(name)
        if name == "last_polarity":
            complete[name] = polarity_of(m)
        elif name == "edge_history":
            complete[name] = edge_history_of(v_hat, plan, age)
        else:
            # `s` as well, which is float32 before it is stored.
            dtype = torch.float32 if name == "s" else form.dtype
            complete[name] = torch.zeros(form.shape, dtype=dtype, device=m.device)
    return complete, added


_HOW = {
    "last_polarity": "last_polarity has the signs of the momentum",
    "edge_history": "edge_history is estimated from the second moments",
    "s": "s begins at zero, as in a new run",
    "lr_mask": "lr_mask begins at zero, as in a new run",
    "spatial_variance": "spatial_variance begins at zero, as in a new run",
}


def note_fresh_states(notes: Notes, added: Sequence[str], name: str) -> None:
    """Says what a parameter's states begin with that no saved state gave."""
    for state in added:
        if state in _HOW:
            notes.changed(_HOW[state], name)
