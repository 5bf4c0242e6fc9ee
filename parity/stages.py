"""Step parity of the gradient stages of section 4: each alone, each pair, all together, in both layouts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np

from parity import streams
from parity.checks import Check
from parity.sides import Arrays
from parity.teacher_forced import BASE, CODE_BOUND, EVERYTHING, UPDATE_BOUND, compare

SUITE = "Gradient stages, teacher-forced"
STEPS = 30
ON: dict[str, dict[str, Any]] = {
    "clip": {"percentile_clipping": 80},
    "edges": {"edge_suppression": True, "edge_penalty": 0.2},
    "frequencies": {"frequency_penalty": 0.5},
    "low rank": {"lora_rank_penalty": True, "rank_penalty_strength": 0.1},
}
OFF: dict[str, Any] = {
    "percentile_clipping": 100,
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "lora_rank_penalty": False,
}
SHAPES: tuple[tuple[int, ...], ...] = (
    (16, 80),  # adapters: two of one shape, one that is turned, short ones
    (16, 80),
    (80, 16),
    (5, 7),
    (7, 3),
    (1, 9),
    (6, 6),  # an adapter of zeros
    (6, 6),  # one with equal singular values
    (2, 5),  # too short for the edge and frequency stages
    (3, 3),
    (40, 33),
    (7, 5, 3),  # convolution kernels of one, two and three spatial axes
    (4, 6, 5, 3),
    (3, 2, 3, 5, 4),
    (300,),
    (),
)


def weights() -> Arrays:
    """Parameters at random, and the cases that a decomposition finds hard."""
    arrays = streams.weights(0, SHAPES)
    arrays[1] = np.outer(arrays[1][:, 0], arrays[1][0]).astype(np.float32)  # rank 1
    arrays[2][:, 8:] = 0
    arrays[6][:] = 0
    arrays[7] = np.eye(6, dtype=np.float32)
    return arrays


def suite(device: str, steps: int = STEPS, share: slice = EVERYTHING) -> Iterable[Check]:
    """The checks of the report, or a share of its runs."""
    alone = [(name,) for name in ON]
    several = [*combinations(ON, 2), tuple(ON)]
    runs = [*((names, "torch") for names in [*alone, *several]), (tuple(ON), "flax")]
    for names, layout in runs[share]:
        yield from checks(names, layout, device, steps)


def checks(names: tuple[str, ...], layout: str, device: str, steps: int) -> Iterable[Check]:
    """One combination of stages, with 8-bit states."""
    fields = BASE | OFF
    for name in names:
        fields |= ON[name]
    found = compare(fields, steps=steps, device=device, shapes=SHAPES, layout=layout, weights=weights())
    kind = f"{' + '.join(names)}, layout {layout}"
    yield Check(SUITE, f"{kind}: updates", found.update, UPDATE_BOUND)
    yield Check(SUITE, f"{kind}: float32 states", found.state, UPDATE_BOUND)
    yield Check(SUITE, f"{kind}: equal codes", found.codes_equal / found.codes, CODE_BOUND, at_least=True)
    yield Check(SUITE, f"{kind}: codes apart", found.code_step, 1)
