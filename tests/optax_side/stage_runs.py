"""Stages of section 4 as transformations, one step after another, held against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from automagic_optax import (
    ClipByPercentileState,
    SuppressEdgesState,
    clip_by_percentile,
    encourage_low_rank,
    suppress_edges,
    suppress_high_frequencies,
)
from tests.optax_side.oracle_runs import relative, to_flax
from tests.optax_side.small import same_but_for_nans
from tests.oracle.chain import GradientStages
from tests.oracle.settings import settings

NAMES = ("clip", "edges", "frequencies", "low_rank")
FIELDS: dict[str, Any] = {
    "percentile_clipping": 60,
    "edge_penalty": 0.2,
    "edge_threshold": 0.3,
    "frequency_penalty": 0.4,
    "rank_penalty_strength": 0.3,
    "low_rank_emphasis": 1.7,
}


class Kind(NamedTuple):
    """An array in PyTorch's order (out, in, *spatial), and its marks."""

    shape: tuple[int, ...]
    lora: bool = False
    embedding: bool = False
    weight: str = "full"


# Arrays of one kind stand apart here, so that batches are not neighbours; `weight` as in `weight_of`.
FEW = (
    Kind(()),
    Kind((3, 7), lora=True),
    Kind((4, 3, 3, 3)),
    Kind((9, 7), embedding=True),
    Kind((3, 7), lora=True, weight="zero"),
    Kind((5,)),
    Kind((4, 3, 3, 3)),
    Kind((3, 7), lora=True, weight="half the rank"),
    Kind((2, 3, 2, 4, 5)),
)
KINDS = (
    *FEW,
    Kind((7, 5), lora=True),
    Kind((1, 7), lora=True),
    Kind((0, 4)),
    Kind((2, 1), lora=True),
    Kind((5, 3, 5)),
    Kind((2, 2, 1, 6)),
    Kind((5, 5), lora=True, weight="repeated values"),
    Kind((5,)),
    Kind((9, 7), embedding=True),
    Kind((4, 3, 3, 3)),
)
# Where a gradient of step 2 is not finite (in batches, one of adapters, and alone), and where there is none at step 3.
SPOILT = (6, 7, 8)
ABSENT = (0, 3, 6)


def weight_of(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights with spectra of several kinds, (short, long), or the other way round by transposing."""
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "full":
        return rng.standard_normal(shape).astype(np.float32)
    if shape[1] < shape[0]:
        return weight_of(kind, shape[::-1], rng).T
    side, length = shape
    w = {
        "rank one": lambda: np.outer(rng.standard_normal(side), rng.standard_normal(length)),
        "exactly rank one": lambda: np.outer(rng.integers(1, 5, side), -rng.integers(1, 5, length)),
        "half the rank": lambda: (
            rng.standard_normal((side, side // 2 + 1)) @ rng.standard_normal((side // 2 + 1, length))
        ),
        "repeated values": lambda: np.linalg.qr(rng.standard_normal((length, side)))[0].T,
        "steep": lambda: rng.standard_normal((side, length)) * np.logspace(0, -6, side)[:, None],
        "tiny": lambda: 1e-30 * rng.standard_normal((side, length)),
        "huge": lambda: 1e30 * rng.standard_normal((side, length)),
    }[kind]()
    return np.asarray(w, np.float32)


def transformations(layout: Any, kinds: Sequence[Kind]) -> dict[str, optax.GradientTransformationExtraArgs]:
    """Each stage by the oracle's name for it."""
    fields = FIELDS
    lora, embedding = [kind.lora for kind in kinds], [kind.embedding for kind in kinds]
    return {
        "clip": clip_by_percentile(fields["percentile_clipping"]),
        "edges": suppress_edges(fields["edge_penalty"], fields["edge_threshold"], layout=layout, embedding=embedding),
        "frequencies": suppress_high_frequencies(fields["frequency_penalty"], layout=layout),
        "low_rank": encourage_low_rank(
            fields["rank_penalty_strength"], fields["low_rank_emphasis"], layout=layout, lora=lora
        ),
    }


def states_of(state: Any, kind: type) -> list[Any]:
    """The states of one type inside an optimizer state."""
    return [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind)]


class StageRun:
    """Steps of some stages in one layout, and the largest errors against the oracle."""

    def __init__(self, names: Sequence[str], layout: str, kinds: Sequence[Kind], *, jit: bool) -> None:
        self.rng = np.random.default_rng(0)
        self.kinds = kinds
        self.layout = layout
        weights = [weight_of(kind.weight, kind.shape, self.rng) for kind in self.kinds]
        self.weights = [self._turned(w, kind) for w, kind in zip(weights, kinds, strict=True)]
        self.params = [jnp.asarray(w) for w in self.weights]
        stages = transformations(layout, kinds)
        self.tx = stages[names[0]] if len(names) == 1 else optax.chain(*(stages[name] for name in names))
        self.update = jax.jit(self.tx.update) if jit else self.tx.update
        self.state = self.tx.init(self.params)
        self.oracle = GradientStages(
            settings(FIELDS | {"spatial_scope": "all"}),
            layout=layout,
            embedding=[kind.embedding for kind in self.kinds],
            lora=[kind.lora for kind in self.kinds],
            disable=set(NAMES) - set(names),
        )
        self.expected: list[dict[str, Any]] = [
            {"age": 0, **self.oracle.initial_state(i, w.shape)} for i, w in enumerate(self.weights)
        ]
        self.changed = 0.0
        self.worst: dict[str, float] = {}

    def _turned(self, x: np.ndarray, kind: Kind) -> np.ndarray:
        return to_flax(x, kind.embedding) if self.layout == "flax" else x

    def gradients(self, size: float = 1.0) -> list[Any]:
        """Random ones, with an array of zeros among them."""
        every = [
            self._turned((size * self.rng.standard_normal(kind.shape)).astype(np.float32), kind) for kind in self.kinds
        ]
        every[2] = np.zeros_like(every[2])
        return every

    def step(self, grads: Sequence[Any]) -> list[Any]:
        """One step of both; what the stages give."""
        updates, self.state = self.update(
            [None if g is None else jnp.asarray(g) for g in grads], self.state, self.params
        )
        skipped = [g is not None and not np.isfinite(g).all() for g in grads]
        takes_part = {
            i: g.astype(np.float64) for i, g in enumerate(grads) if g is not None and g.size > 0 and not skipped[i]
        }
        expected = self.oracle(takes_part, skipped, self.expected, self.weights)
        for i, g in enumerate(grads):
            if i not in expected:
                # No gradient stays none; one that cannot be used, or has no elements, passes as it is.
                assert (updates[i] is None) if g is None else same_but_for_nans(updates[i], g)
                continue
            self.expected[i]["age"] += 1
            self._note("gradient", updates[i], expected[i])
            self.changed = max(self.changed, relative(g, expected[i]))
        for found in states_of(self.state, SuppressEdgesState):
            for ours, theirs in zip(found.edge_history, self.expected, strict=True):
                assert (ours is None) == ("edge_history" not in theirs)
                if ours is not None:
                    self._note("edge_history", ours, theirs["edge_history"])
            for age, theirs in zip(found.age, self.expected, strict=True):
                assert "edge_history" not in theirs or int(age) == theirs["age"]
        for found in states_of(self.state, ClipByPercentileState):
            if self.oracle.clip.ring:
                self._note("norm_history", np.sort(found.norm_history), np.sort(self.oracle.clip.ring))
        return updates

    def _note(self, name: str, ours: Any, theirs: Any) -> None:
        self.worst[name] = max(self.worst.get(name, 0.0), relative(ours, theirs))
