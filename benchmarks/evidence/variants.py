"""What is compared: this optimizer's profiles, each with stages off or stronger, and four others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Starting rates that every variant is tried at, on seed 0."""
WIDER = (1e-6, 1e-5, 1e-1)
"""What the curve of loss against starting rate adds."""
LADDER = (1e-6, 1e-5, *GRID, 1e-1)
"""Where a search goes on whose best rate lies at an end of the grid."""
SEEDS = (0, 1, 2)
PAIRED_SEEDS = tuple(range(12))
"""For the interval of 8 bits against 32 on the cheapest job."""

WEIGHT_DECAY = 0.01
"""The same for all: torch's default for AdamW."""
MAX_LR = 1.0
"""Far above any good rate, so that votes and not the limit stop the search."""
WARM_UP_SHARE = 0.4
"""Part of the steps in which this optimizer's votes go on."""
RAMP_SHARE = 0.1
"""Part of the steps in which the rate of the others, which need no search, rises."""


@dataclass(frozen=True)
class Variant:
    """One optimizer with its settings, but for the rate.

    Attributes:
        name: in file names.
        title: in the report.
        optimizer: ``"ours"`` or a name of `optimizers.BASELINES`.
        fields: of `automagic_core.Config`; only for ours.
    """

    name: str
    title: str
    optimizer: str = "ours"
    fields: Mapping[str, Any] = field(default_factory=dict)


PROFILES = ("memory_optimized", "balanced", "quality_optimized")
THIRTY_TWO = "-32bit"
"""What the name of a profile's 32-bit partner ends with."""
STRONG = "-strong"

STAGES: Mapping[str, Mapping[str, Any]] = {
    "edges": {"edge_suppression": False},
    "frequency": {"frequency_penalty": 0.0},
    "low-rank": {"lora_rank_penalty": False},
}
"""How each stage that `balanced` has on is switched off."""
STRONGER: Mapping[str, Mapping[str, Any]] = {
    "edges": {"edge_penalty": 0.2, "edge_threshold": 0.0},
    "frequency": {"frequency_penalty": 1.0},
    "low-rank": {"rank_penalty_strength": 0.1},
}
"""The same stages far above the profile's strength."""


def _balanced(name: str, title: str, fields: Mapping[str, Any]) -> Variant:
    return Variant(f"balanced-{name}", f"`balanced` {title}", fields={"profile": "balanced", **fields})


def _describe(fields: Mapping[str, Any]) -> str:
    return "with " + ", ".join(f"`{name}` {value}" for name, value in fields.items())


_ALL_OFF = {name: value for fields in STAGES.values() for name, value in fields.items()}

MAIN = (
    Variant("adamw", "AdamW", "adamw"),
    Variant("balanced", "`balanced`", fields={"profile": "balanced"}),
    Variant("memory_optimized", "`memory_optimized`", fields={"profile": "memory_optimized"}),
    Variant("quality_optimized", "`quality_optimized`", fields={"profile": "quality_optimized"}),
    Variant("cautious-adamw", "Cautious AdamW", "cautious-adamw"),
    Variant("adamw8bit", "AdamW8bit (bitsandbytes)", "adamw8bit"),
    Variant("came", "CAME", "came"),
    *(_balanced(f"no-{stage}", f"without {stage}", fields) for stage, fields in STAGES.items()),
    _balanced("percentile-95", "with percentile clipping at 95", {"percentile_clipping": 95}),
)
"""Compared at the best rate of each."""

EXTRA = (
    _balanced("no-stages", "without edges, frequency and low-rank", _ALL_OFF),
    _balanced("no-search", "without the rate search", {"search_gain": 0.0}),
)
"""Compared likewise, but run last."""

PARTNERS = tuple(
    Variant(profile + THIRTY_TWO, f"`{profile}`, 32-bit", fields={"profile": profile, "optim_bits": 32})
    for profile in PROFILES
)
"""Run at the rate of their 8-bit profile, never at one of their own."""

STRONG_STAGES = tuple(_balanced(stage + STRONG, _describe(fields), fields) for stage, fields in STRONGER.items())
"""Run at the rate of `balanced`."""

VARIANTS: Mapping[str, Variant] = {v.name: v for v in (*MAIN, *EXTRA, *PARTNERS, *STRONG_STAGES)}
