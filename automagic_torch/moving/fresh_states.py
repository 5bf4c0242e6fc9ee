"""Start values for states that a migrated or requantized run lacks (docs/algorithm.md, section 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_core.arrays.bias import weight_seen
from automagic_core.arrays.state_forms import coded_shapes
from automagic_core.config.constants import EDGE_DECAY, SQUARE_FLOOR, SQUARES_OF_LAPLACIAN
from automagic_core.moving.notes import Notes
from automagic_torch.arrays.means import Means
from automagic_torch.codec.stored import States, state_forms
from automagic_torch.stages.suppress_edges import laplacian


def edge_history_of(v_hat: Tensor, plan: StatePlan, age: int) -> Tensor:
    """The `edge_history` that independent gradients of variance v̂ would give.

    Real gradients are smoother, so stage 2 will smooth the next steps too little.  With zeros it would smooth too much.
    """
    assert plan.spatial_axes is not None, "only arrays with spatial axes have a history"
    variance = laplacian(v_hat, plan.spatial_axes) + SQUARES_OF_LAPLACIAN * v_hat
    # E |x| of a normal variable is √(2/π) σ.
    usual = Means(plan).rows((variance.clamp(min=0).sqrt() * math.sqrt(2 / math.pi))[None])[0]
    return usual * weight_seen(EDGE_DECAY, age)


def background_of(v_hat: Tensor) -> Tensor:
    """`background_scale`: the mean of √v̂."""
    return v_hat.clamp(min=SQUARE_FLOOR).sqrt().mean()


def with_fresh_states(
    values: States, v_hat: Tensor, age: int, plan: StatePlan, warming: bool
) -> tuple[States, list[str]]:
    """Adds start values for the states that are missing.

    Args:
        values: the known states; float32.
        v_hat: v̂, float32 in the array's shape.
        age: the array's age, ≥ 1.
        plan: plan of its states.
        warming: fewer than `warmup_steps` steps are over.

    Returns:
        All states of the plan, and the names of the added ones.
    """
    complete, added = dict(values), []
    for name, form in state_forms(plan, warming).items():
        if name in complete or name.endswith("_absmax"):
            continue
        added.append(name)
        if name == "edge_history":
            complete[name] = edge_history_of(v_hat, plan, age)
        else:
            # Moments are float32 before they are quantized.
            dtype = torch.float32 if name in coded_shapes(plan) else form.dtype
            complete[name] = torch.zeros(form.shape, dtype=dtype, device=v_hat.device)
    return complete, added


_HOW = {
    "edge_history": "edge_history is estimated from the second moments",
    "walk": "walk begins at zero, and the search measures from here on",
    "s": "s begins at zero, as in a new run",
    "lr_mask": "lr_mask begins at zero, as in a new run",
    "spatial_variance": "spatial_variance begins at zero, as in a new run",
}


def note_fresh_states(notes: Notes, added: Sequence[str], name: str) -> None:
    """Notes the start values of added states."""
    for state in added:
        if state in _HOW:
            notes.changed(_HOW[state], name)
