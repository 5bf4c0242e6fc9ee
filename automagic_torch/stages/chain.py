"""Applies the gradient stages to a batch, one after another (docs/algorithm.md, section 2)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from automagic_core import Config, Layout, StatePlan
from automagic_core.watching.metrics import STAGES
from automagic_torch.arrays.means import Means
from automagic_torch.codec.stored import States
from automagic_torch.stages.encourage_low_rank import encourage_low_rank
from automagic_torch.stages.energy import StageEnergy
from automagic_torch.stages.suppress_edges import suppress_edges
from automagic_torch.stages.suppress_high_frequencies import suppress_high_frequencies

CLIP, EDGES, FREQUENCIES, LOW_RANK = STAGES


class StageArrays(NamedTuple):
    """What the stages must know about the arrays of a batch."""

    plan: StatePlan
    config: Config
    layout: Layout
    embedding: bool
    lora: bool

    @property
    def low_rank(self) -> bool:
        """Whether stage 4 works on the arrays."""
        return self.lora and self.config.encourages_low_rank

    @property
    def changed(self) -> bool:
        """Whether stage 2, 3 or 4 works on the arrays."""
        frequencies = self.config.suppresses_frequencies and self.plan.spatial_axes is not None
        return self.plan.has_edge_history or frequencies or self.low_rank


class StageInputs(NamedTuple):
    """The tensors with which the stages compute, for a batch.

    Attributes:
        factor: by which stage 1 multiplies the gradients, 0-d; None where it is off.
        g: raw gradients, float32, stacked; zeros for skipped arrays.
        w: the parameters, float32.
        edge_history: before the step, if the arrays have one.
        age: the arrays' ages, this step included, (arrays, 1, …, 1).
    """

    factor: Tensor | None
    g: Tensor
    w: Tensor
    edge_history: Tensor | None
    age: Tensor


def after_stages(arrays: StageArrays, inputs: StageInputs, energy: StageEnergy, means: Means) -> tuple[Tensor, States]:
    """The gradients after the stages, and the new states of the stages.

    Args:
        arrays: the facts about the arrays.
        inputs: their tensors.
        energy: records what every stage does.
        means: forms Σ g² of the raw gradients.
    """
    plan, config, layout, embedding, _ = arrays
    factor, g, w, edge_history, age = inputs
    new: States = {}
    energy.begin(g, means.square_norm)
    if factor is not None:
        g = g * factor
    energy.scaled(CLIP, factor)

    if plan.has_edge_history:
        g, history = suppress_edges(
            g,
            edge_history,
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
        own = g is not inputs.g  # which may be `p.grad` itself
        g = suppress_high_frequencies(g, penalty=config.frequency_penalty, layout=layout, batched=True, in_place=own)
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
