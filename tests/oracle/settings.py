"""Section 7 of ALGORITHM.md as the float64 oracle takes it: defaults, what it cannot compute, what can be disabled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

DEFAULTS: dict[str, Any] = {
    "lr": 1e-6,
    "min_lr": 1e-7,
    "max_lr": 1e-3,
    "weight_decay": 5e-4,
    "warmup_steps": 500,
    "betas": (0.9, 0.99, 0.999),
    "update_clip": 3.0,
    "confidence_floor": 0.01,
    "factored": "second_moment",
    "torque": True,
    "torque_decay": 0.0,
    "search_gain": 0.5,
    "straightness": 1.2,
    "agreement_floor": -0.1,
    "lr_mask_gain": 0.0,
    "background_regularization": True,
    "spatial_awareness": True,
    "percentile_clipping": 100,
    "spatial_scope": "conv",
    "edge_suppression": True,
    "edge_penalty": 0.1,
    "edge_threshold": 0.6,
    "frequency_penalty": 0.05,
    "lora_rank_penalty": True,
    "rank_penalty_strength": 0.003,
    "low_rank_emphasis": 1.0,
}
# The other fields change nothing at 32 bits, or may only be given as they are here.
WITHOUT_EFFECT = {"min_8bit_size", "block_size", "block_wise", "stable_emb", "force_8bit", "verbose"}
WITHOUT_EFFECT |= {"stochastic_rounding", "stochastic_rounding_params"}
ONLY = {"optim_bits": 32}
# The fields that switch the stages of section 4 off.  Those that a test switches on again work on matrices too.
STAGES_OFF: dict[str, Any] = {
    "spatial_scope": "all",
    "percentile_clipping": 100,
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "lora_rank_penalty": False,
}

# What `disable` knows of sections 5 and 6, and of section 4.
FEATURES = {"update_clip", "confidence", "torque", "torque_mean", "search", "agreement", "lr_mask", "max_lr", "growth"}
FEATURES |= {"spatial", "background", "weight_decay", "warmup_ramp", "bias_correction", "nonfinite", "calm"}
STAGES = {"clip", "edges", "frequencies", "low_rank"}


def settings(fields: dict[str, Any]) -> SimpleNamespace:
    """The fields given over the defaults; ValueError for one that this oracle does not compute."""
    known = {name: value for name, value in fields.items() if name in DEFAULTS}
    for name in set(fields) - set(known) - WITHOUT_EFFECT:
        if name not in ONLY or fields[name] != ONLY[name]:
            raise ValueError(f"not what this oracle computes: {name} = {fields[name]!r}")
    return SimpleNamespace(**{**DEFAULTS, **known})
