"""The gradient stages on shards (section 4).

Rows of axis 0 are neighbours in a 2-D array, and its spectrum and its singular values are those of all of it: stages 2
to 4 then work on whole gradients.  Every process gathers those of one batch at a time, with the rows' histories and,
for stage 4, the parameters, computes the same, and keeps its piece.  So a process receives the float32 gradient of
every such array once in a step, and holds one batch of them (`automagic_torch.cameamp.batches.BATCH_LIMIT` elements, or
one larger array) with what the stages need beside it.  Convolutions in PyTorch's layout are not gathered: their
pictures lie within their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from automagic_torch.arrays.means import Means
from automagic_torch.codec.stored import States
from automagic_torch.sharding.exchange import gathered
from automagic_torch.sharding.split import Split
from automagic_torch.stages.chain import StageInputs, after_stages
from automagic_torch.stages.energy import StageEnergy


def sharded_stages(
    arrays: StageInputs,
    factor: Tensor | None,
    split: Split,
    g: Tensor,
    w: Tensor,
    old: States,
    age: Tensor,
    energy: StageEnergy,
    means: Means,
) -> tuple[Tensor, States]:
    """As `automagic_torch.stages.chain.after_stages`, of pieces."""
    low_rank = arrays.low_rank
    if split.count == 1 or not stages_gather(arrays):
        return after_stages(arrays, factor, g, w, old, age, energy, means)
    history = old.get("edge_history")
    history_is_split = history is not None and arrays.plan.row_axis == 0
    # Everything that is split travels at once, as further columns.
    travellers = [g, *([w] if low_rank else []), *([history] if history is not None and history_is_split else [])]
    whole = _gathered_together(travellers, split)
    whole_g, whole_w = whole[0], whole[1] if low_rank else w
    whole_old = {} if history is None else {"edge_history": whole[-1] if history_is_split else history}
    whole_g, new = after_stages(arrays, factor, whole_g, whole_w, whole_old, age, energy, Means(arrays.plan))
    if history_is_split:
        new = {name: split.piece(value, axis=1).contiguous() for name, value in new.items()}
    return split.piece(whole_g, axis=1).contiguous(), new


def stages_gather(arrays: StageInputs) -> bool:
    """Whether a stage is on that looks beyond what is in one piece."""
    plan, config = arrays.plan, arrays.config
    if arrays.low_rank:
        return True
    if plan.spatial_axes is None:
        return False
    # The history of a row is the mean over all its columns, which axis 0 is one of where it does not count rows.
    cut = 0 in plan.spatial_axes
    return (plan.has_edge_history and (cut or plan.row_axis != 0)) or (config.suppresses_frequencies and cut)


def _gathered_together(tensors: list[Tensor], split: Split) -> list[Tensor]:
    """Stacked pieces, (arrays, rows here, ...), as whole arrays."""
    flat = [x.reshape(*x.shape[:2], x.shape[2:].numel()) for x in tensors]
    every = gathered(torch.cat(flat, 2) if len(flat) > 1 else flat[0], split)
    parts = every.split([x.shape[2] for x in flat], 2)
    return [part.reshape(*part.shape[:2], *x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]
