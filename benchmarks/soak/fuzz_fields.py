"""Random configurations: every field, valid ones and such with one value that is not."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

Fields = dict[str, Any]


def _powers(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of every size between two powers of ten."""
    return st.floats(low, high).map(lambda exponent: float(10.0**exponent))


_BETA = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999]), st.floats(0.0, 0.9999))

_OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "weight_decay": st.one_of(st.just(0.0), _powers(-6, 1)),
    "warmup_steps": st.sampled_from([0, 1, 2, 3, 5, 500, 2**31 - 2]),
    "betas": st.tuples(_BETA, _BETA, _BETA),
    "update_clip": _powers(-2, 3),
    "confidence_floor": _powers(-4, 1),
    "factored": st.sampled_from(["none", "second_moment", "all"]),
    "torque": st.booleans(),
    "torque_decay": _BETA,
    "search_gain": st.one_of(st.just(0.0), _powers(-3, 1)),
    "straightness": _powers(-1, 1),
    # None of them is an average of few votes, at which rounding decides.
    "agreement_floor": st.sampled_from([-1.0, -0.3, -0.05, 0.07, 0.9]),
    "lr_mask_gain": st.one_of(st.just(0.0), _powers(-3, 2)),
    "optim_bits": st.sampled_from([8, 32]),
    "percentile_clipping": st.integers(1, 100),
    "block_size": st.sampled_from([64, 128, 256, 512, 1024, 2048, 4096]),
    "block_wise": st.booleans(),
    "stable_emb": st.booleans(),
    "stochastic_rounding": st.booleans(),
    "stochastic_rounding_params": st.booleans(),
    "edge_suppression": st.booleans(),
    "edge_penalty": st.floats(0.0, 0.2),
    "edge_threshold": st.one_of(st.just(0.0), _powers(-2, 2)),
    "background_regularization": st.booleans(),
    "spatial_awareness": st.booleans(),
    # A smaller one changes nothing in float32 but adds the noise of a Fourier transform, which zeros do not survive.
    "frequency_penalty": st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
    "lora_rank_penalty": st.booleans(),
    "rank_penalty_strength": st.floats(0.0, 0.99),
    "low_rank_emphasis": st.floats(1.0, 10.0),
    "profile": st.sampled_from([None, "memory_optimized", "balanced", "quality_optimized"]),
    "verbose": st.just(False),
}
# Given in every configuration, since the defaults would leave arrays of these sizes in 32 bits.
_BITS: dict[str, st.SearchStrategy[Any]] = {
    "force_8bit": st.sampled_from([True, True, False]),
    "min_8bit_size": st.sampled_from([1, 1, 2, 64, 1024, 4096]),
}

_NUMBERS = [math.nan, math.inf, -math.inf, -1.0, "1", None, True, 1j]
_SWITCH = [None, 1, 0, "yes", 0.0]
INVALID: dict[str, list[Any]] = {
    **dict.fromkeys(("weight_decay", "search_gain", "lr_mask_gain", "edge_threshold"), _NUMBERS),
    **{name: [*_NUMBERS, 0.0] for name in ("min_lr", "max_lr", "update_clip", "confidence_floor", "straightness")},
    "agreement_floor": [math.nan, math.inf, -1.01, 1.01, "1", None, True],
    "warmup_steps": [-1, 1.5, 2**31, None, True, "5"],
    "betas": [(0.9, 0.99), (0.9, 0.99, 1.0), (-0.1, 0.9, 0.9), (0.9, math.nan, 0.9), 0.9, None],
    "factored": ["row", None, True, 1],
    **{name: [*_NUMBERS, 1.0] for name in ("torque_decay", "rank_penalty_strength")},
    "optim_bits": [4, 16, 8.0, "8", None],
    "min_8bit_size": [0, -1, 1.5, None],
    "percentile_clipping": [0, 101, 50.0, None, True],
    "block_size": [0, 32, 100, 8192, 256.0, None],
    "edge_penalty": [*_NUMBERS, 0.21],
    "frequency_penalty": [*_NUMBERS, 1.01],
    "low_rank_emphasis": [*_NUMBERS, 0.99],
    "profile": ["fast", 1, True],
    **dict.fromkeys(
        (
            *("torque", "block_wise", "stable_emb", "force_8bit", "stochastic_rounding", "stochastic_rounding_params"),
            *("edge_suppression", "background_regularization", "spatial_awareness", "lora_rank_penalty", "verbose"),
        ),
        _SWITCH,
    ),
    "learning_rte": [1e-3],
}
"""Values that must be refused by name; the last name is no field at all."""


@st.composite
def valid_fields(draw: st.DrawFn) -> Fields:
    """A configuration in which most fields may be missing."""
    fields: Fields = draw(st.fixed_dictionaries(_BITS, optional=_OTHERS))
    low, middle, high = sorted(draw(st.lists(_powers(-8, 0), min_size=3, max_size=3)))
    return {"lr": middle, "min_lr": low, "max_lr": high, **fields}


@st.composite
def invalid_fields(draw: st.DrawFn) -> tuple[Fields, str]:
    """A configuration with one value that is not valid, and the name that the error must give."""
    fields = draw(valid_fields())
    name = draw(st.sampled_from([*INVALID, "lr below", "lr above"]))
    if name.startswith("lr"):
        return {**fields, "lr": fields["min_lr"] / 2 if name == "lr below" else 2 * fields["max_lr"]}, "lr"
    return {**fields, name: draw(st.sampled_from(INVALID[name]))}, name
