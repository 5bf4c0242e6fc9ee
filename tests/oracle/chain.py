"""Section 2 of ALGORITHM.md: stages 1 to 4 in their order, in front of section 5."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.oracle.stages import (
    Array,
    PercentileClip,
    encourage_low_rank,
    initial_edge_history,
    suppress_edges,
    suppress_high_frequencies,
)


class GradientStages:
    """The stages of one parameter group; the ring is kept here, `edge_history` in the arrays' states."""

    def __init__(
        self,
        cfg: SimpleNamespace,
        *,
        layout: str,
        embedding: Sequence[bool],
        lora: Sequence[bool],
        disable: Collection[str],
    ) -> None:
        self.cfg = cfg
        self.layout = layout
        self.embedding = embedding
        self.lora = lora
        self.clip = PercentileClip(100 if "clip" in disable else cfg.percentile_clipping)
        self.use_edges: bool = cfg.edge_suppression and "edges" not in disable
        self.use_frequencies: bool = cfg.frequency_penalty > 0 and "frequencies" not in disable
        self.use_low_rank: bool = cfg.lora_rank_penalty and "low_rank" not in disable

    def initial_state(self, i: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """`edge_history`, a name only of the arrays on which that stage works."""
        works = self.use_edges and self._in_scope(shape)
        history = initial_edge_history(shape, self.layout, self.embedding[i]) if works else None
        return {} if history is None else {"edge_history": history}

    def _in_scope(self, shape: tuple[int, ...]) -> bool:
        """Stages 2 and 3 work on matrices only if asked to."""
        return self.cfg.spatial_scope == "all" or len(shape) > 2

    def __call__(
        self,
        raw: dict[int, Array],
        skipped: Sequence[bool],
        state: Sequence[dict[str, Any]],
        params: Sequence[Any],
    ) -> dict[int, Array]:
        """`raw` holds the arrays that take part; their `edge_history` advances, their `age` is still to grow."""
        clipped = self.clip([raw.get(i) for i in range(len(skipped))], skipped)
        return {i: self._one(i, g, state[i], params[i]) for i, g in enumerate(clipped) if g is not None}

    def _one(self, i: int, g: Array, state: dict[str, Any], param: Any) -> Array:
        place: dict[str, Any] = {"layout": self.layout, "embedding": self.embedding[i]}
        if "edge_history" in state:
            age = state["age"] + 1  # of this array, this step included
            strengths = {"penalty": self.cfg.edge_penalty, "threshold": self.cfg.edge_threshold}
            g, state["edge_history"] = suppress_edges(g, state["edge_history"], age, **place, **strengths)
        if self.use_frequencies and self._in_scope(g.shape):
            g = suppress_high_frequencies(g, layout=self.layout, penalty=self.cfg.frequency_penalty)
        if self.lora[i] and self.use_low_rank:
            w = np.asarray(param).astype(np.float64)
            strengths = {"strength": self.cfg.rank_penalty_strength, "emphasis": self.cfg.low_rank_emphasis}
            g = encourage_low_rank(g, w, **place, **strengths)
        return g
