"""The oracle's chain of section 2 of ALGORITHM.md against the stages called one by one in front of section 5 alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.oracle.cameamp import CameampOracle
from tests.oracle.settings import STAGES_OFF
from tests.oracle.stages import (
    PercentileClip,
    encourage_low_rank,
    initial_edge_history,
    suppress_edges,
    suppress_high_frequencies,
)


def test_the_chain_in_front_of_section_5() -> None:
    rng = np.random.default_rng(8)
    shapes = [(6, 5), (4, 2, 3, 3), (5,), (8, 4)]
    stages: dict[str, Any] = {
        "spatial_scope": "all",
        "percentile_clipping": 30,
        "edge_penalty": 0.2,
        "edge_threshold": 0.1,
    }
    stages |= {"frequency_penalty": 0.4, "rank_penalty_strength": 0.3, "low_rank_emphasis": 1.5}
    fields: dict[str, Any] = {"lr": 1e-3, "max_lr": 1.0, "warmup_steps": 6, "weight_decay": 0.1, "straightness": 1.0}
    chained = CameampOracle(shapes, lora=[False, False, False, True], **fields, **stages)
    bare = CameampOracle(shapes, **fields, **STAGES_OFF)
    clip = PercentileClip(30)
    history = [initial_edge_history(shape, "torch") for shape in shapes]
    ages, w = [0] * 4, [rng.normal(size=shape) for shape in shapes]
    for t in range(9):
        size = 0.3 if t == 0 else 1.0  # so that later steps are clipped, but not those with an array skipped
        grads: list[Any] = [size * rng.normal(size=shape) ** 3 for shape in shapes]
        skipped = [False] * 4
        if t in (1, 2):
            grads[t] = None
        if t in (3, 4, 5):
            grads[t - 3][:1] = [np.nan, np.inf, 2e15][t - 3]
            skipped[t - 3] = True
        staged = clip(grads, skipped)
        for i in (0, 1, 2, 3):
            if grads[i] is None or skipped[i]:
                continue
            g = staged[i]
            assert g is not None
            ages[i] += 1
            if i != 2:
                g, history[i] = suppress_edges(g, history[i], ages[i], layout="torch", penalty=0.2, threshold=0.1)
                g = suppress_high_frequencies(g, layout="torch", penalty=0.4)
            if i == 3:
                g = encourage_low_rank(g, w[i], layout="torch", strength=0.3, emphasis=1.5)
            staged[i] = g
        updates, expected = chained.step_(grads, w), bare.step_(staged, w)
        for i in range(4):
            np.testing.assert_allclose(updates[i], expected[i], rtol=1e-9, err_msg=f"{t} {i}")
            assert chained.state[i]["skipped_steps"] == bare.state[i]["skipped_steps"]
        for name in ("log_rate_scale", "walk_energy", "agreement"):
            assert getattr(chained, name) == pytest.approx(getattr(bare, name))
        w = [x + u for x, u in zip(w, updates, strict=True)]
    assert ages == [state["age"] for state in chained.state] == [8, 7, 7, 9]
    for i in (0, 1, 3):
        np.testing.assert_array_equal(chained.state[i]["edge_history"], history[i])
    assert "edge_history" not in chained.state[2]
