"""On a GPU one loop over blocks computes a step: it finds the absmax of new states and writes their codes.

Where rows are no whole number of blocks, loops over rows and loops over blocks are two, and what both need is stored
between them.  So parameters, gradients and states of elements are seen as (arrays, blocks, elements of a block).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from automagic_core.arrays.state_forms import coded_shapes
from automagic_torch.arrays.means import BlockMeans
from automagic_torch.steps.new_values import Given, Way

OF_ROWS = ("last_polarity", "walk", "lr_mask", "spatial_variance")
"""States that need sums over rows of what a step computes for each element."""
LONGEST = 256
"""Elements of a block of the default size."""


def can_be_in_blocks(way: Way, given: Given) -> bool:
    """Whether only the second moment is factored, and nothing else looks at rows."""
    plan = way.extent.plan
    return (
        len(plan.shape) == 2
        and way.share == 1
        and not way.shows
        and plan.quantized
        and not plan.factored_res
        and plan.block_size is not None
        and plan.size % plan.block_size == 0
        and not any(name in given.stored for name in OF_ROWS)
    )


def in_blocks(way: Way, given: Given) -> Given:
    """The same memory in the shape of blocks."""
    plan = way.extent.plan
    means, coded = BlockMeans(plan), coded_shapes(plan)
    names = [name for name in coded if coded[name] == plan.shape and name in given.stored]
    stored = {name: means.elementwise(given.stored[name]) for name in names}
    stored |= {name + "_absmax": given.stored[name + "_absmax"].view(len(given.g), -1, 1) for name in names}
    return given._replace(before=means.elementwise(given.before), stored=given.stored | stored)


def blocks_in_registers() -> AbstractContextManager[Any]:
    """What is compiled within it reads a block once, though its absmax is known only at its end."""
    from torch._inductor.virtualized import V

    return V.set_choices_handler(_choices())  # type: ignore[no-any-return]


@cache
def _choices() -> Any:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            """Inductor would do so only if the loop read nothing but arrays of its own shape."""
            return bool(
                V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST)
                or InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
            )

    return Choices()
