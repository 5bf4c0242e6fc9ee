"""The gradient stages one after another, on a batch (section 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from automagic_core import Config, StatePlan
from automagic_torch.arrays.means import Means
from automagic_torch.codec.stored import States
from automagic_torch.stages.encourage_low_rank import encourage_low_rank
from automagic_torch.stages.energy import NAMES, StageEnergy
from automagic_torch.stages.suppress_edges import suppress_edges
from automagic_torch.stages.suppress_high_frequencies import suppress_high_frequencies

CLIP, EDGES, FREQUENCIES, LOW_RANK = NAMES


class StageInputs(NamedTuple):
    """What the stages must know of the arrays of a batch, besides numbers."""

    plan: StatePlan
    config: Config
    layout: Any
    embedding: bool
    lora: bool

    @property
    def low_rank(self) -> bool:
        """Stage 4 works on the arrays."""
        return self.lora and self.config.encourages_low_rank


def after_stages(
    arrays: StageInputs,
    factor: Tensor | None,
    g: Tensor,
    w: Tensor,
    old: States,
    age: Tensor,
    energy: StageEnergy,
    means: Means,
) -> tuple[Tensor, States]:
    """The gradients that section 5 sees, and the new states of the stages.

    Args:
        arrays: which they are.
        factor: what stage 1 multiplies by, 0-d; None where it is off.
        g: raw gradients, float32, stacked, those of skipped arrays as zeros.
        w: the parameters, float32.
        old: states before the step.
        age: the arrays' ages, this step included, (arrays, 1, …, 1).
        energy: is told what every stage does.
        means: of the gradients as they come.
    """
    plan, config, layout, embedding, _ = arrays
    new: States = {}
    energy.begin(g, means.square_norm)

    if factor is not None:
        g = g * factor
    energy.scaled(CLIP, factor)

    if plan.has_edge_history:
        g, history = suppress_edges(
            g,
            old["edge_history"],
            age,
            penalty=config.edge_penalty,
            threshold=config.edge_threshold,
            layout=layout,
            embedding=embedding,
            batched=True,
        )
        assert history is not None
        new["edge_history"] = history
    energy.passed(EDGES, g, changed=plan.has_edge_history)

    frequencies = config.suppresses_frequencies and plan.spatial_axes is not None
    if frequencies:
        g = suppress_high_frequencies(g, penalty=config.frequency_penalty, layout=layout, batched=True)
    energy.passed(FREQUENCIES, g, changed=frequencies)

    if arrays.low_rank:
        g = encourage_low_rank(
            g,
            w,
            strength=config.rank_penalty_strength,
            emphasis=config.low_rank_emphasis,
            layout=layout,
            embedding=embedding,
            batched=True,
        )
    energy.passed(LOW_RANK, g, changed=arrays.low_rank)
    return g, new
