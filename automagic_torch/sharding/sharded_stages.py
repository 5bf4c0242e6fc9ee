"""Gathers whole gradients where a stage needs more than a piece (docs/algorithm.md, section 9.1).

Stages 2 to 4 need all rows of a 2-D array.  Every process gathers the gradients of one batch at a time, with
`edge_history` and, for stage 4, the parameters.  All processes then compute the same, and each keeps its piece.
Convolutions in PyTorch's layout are not gathered, since their spatial axes are not split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_torch.arrays.means import Means
from automagic_torch.codec.stored import States
from automagic_torch.sharding.exchange import gathered
from automagic_torch.sharding.split import Split
from automagic_torch.stages.chain import StageArrays, StageInputs, after_stages
from automagic_torch.stages.energy import StageEnergy


def sharded_stages(
    arrays: StageArrays, inputs: StageInputs, energy: StageEnergy, means: Means, split: Split
) -> tuple[Tensor, States]:
    """As `automagic_torch.stages.chain.after_stages`, for pieces."""
    if split.count == 1 or not stages_gather(arrays):
        return after_stages(arrays, inputs, energy, means)
    # One exchange for everything that is split.
    split_names = ["g", *(["w"] if arrays.low_rank else [])]
    if inputs.edge_history is not None and arrays.plan.row_axis == 0:
        split_names.append("edge_history")
    whole = _gathered_together([getattr(inputs, name) for name in split_names], split)
    inputs = inputs._replace(**dict(zip(split_names, whole, strict=True)))
    g, new = after_stages(arrays, inputs, energy, Means(arrays.plan))
    if "edge_history" in split_names:
        new = {name: split.piece(value, axis=1).contiguous() for name, value in new.items()}
    return split.piece(g, axis=1).contiguous(), new


def stages_gather(arrays: StageArrays) -> bool:
    """Whether a stage is on that needs more than one piece."""
    plan, config = arrays.plan, arrays.config
    if arrays.low_rank:
        return True
    if plan.spatial_axes is None:
        return False
    # `edge_history` needs whole rows, which are split where axis 0 is not the row axis.
    cut = 0 in plan.spatial_axes
    return (plan.has_edge_history and (cut or plan.row_axis != 0)) or (config.suppresses_frequencies and cut)


def _gathered_together(tensors: list[Tensor], split: Split) -> list[Tensor]:
    """Whole arrays from several stacked pieces, (arrays, length of axis 0 here, ...), with one exchange."""
    flat = [x.reshape(*x.shape[:2], x.shape[2:].numel()) for x in tensors]
    every = gathered(torch.cat(flat, 2) if len(flat) > 1 else flat[0], split)
    parts = torch.split(every, [x.shape[2] for x in flat], 2)
    return [part.reshape(*part.shape[:2], *x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]
