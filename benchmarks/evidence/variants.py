"""What is compared: this optimizer with and without its search and its parts, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""Rates that a grid is made of."""
STARTS = (1e-6, 1e-4, 3e-3)
"""Rates from which the search has to find its own; all from 1e-5 on begin at 1e-5 and are one run but for roundings."""
START = 1e-4
"""Where the search begins when the start is not what is asked."""
PICTURED = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Starts in the picture."""
SEEDS = (0, 1, 2)
MORE_SEEDS: Mapping[str, tuple[int, ...]] = {"docstrings": (0, 1, 2, 3, 4, 5)}
"""Where one run differs from the next by more than what is compared: 5 % there, below 1 % elsewhere."""
PAIRED_SEEDS = tuple(range(12))
"""For the interval of 8 bits against 32 on the cheapest job."""

TORCH, JAX = "torch", "jax"


def seeds_of(job: str) -> tuple[int, ...]:
    """The seeds of a job's tuned rates and starts."""
    return MORE_SEEDS.get(job, SEEDS)


@dataclass(frozen=True)
class Variant:
    """One method with its settings, but for the number it starts from.

    Attributes:
        name: in file names.
        title: in the report.
        optimizer: ``"ours"`` or a name of `rivals.RECIPES`.
        fields: of `automagic_core.Config`; only for ours.
        starts: those it is run from; empty: a rate, the best of a grid.
        curve: starts of its line in the picture.
        knob: what a start is.
        in_jax: whether the jobs in JAX have it too.
        swaps: of `optimizers.SWAPS`.
    """

    name: str
    title: str
    optimizer: str = "ours"
    fields: Mapping[str, Any] = field(default_factory=dict)
    starts: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    knob: str = "rate"
    in_jax: bool = False
    swaps: tuple[str, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether its rate is the best of a grid."""
        return not self.starts


def _ours(name: str, title: str, fields: Mapping[str, Any] | None = None, **rest: Any) -> Variant:
    return Variant(name, title, fields={"profile": "balanced", **(fields or {})}, **rest)


def _tuned(name: str, title: str, fields: Mapping[str, Any] | None = None, **rest: Any) -> Variant:
    return _ours(name, title, {"search_gain": 0.0, **(fields or {})}, **rest)


ADAMW = Variant("adamw", "AdamW", "adamw", in_jax=True, curve=(1e-6, *LADDER))
OURS = _ours("balanced", "ours", starts=STARTS, curve=(*PICTURED, 1e-1), knob="starting rate", in_jax=True)
TUNED = _tuned("tuned", "ours, tuned rate, no search", in_jax=True)
CAUTIOUS = Variant("cautious-adamw", "Cautious AdamW", "cautious-adamw")

_D0: dict[str, Any] = {"starts": (1e-6,), "curve": (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2), "knob": "d₀"}
_COARSE = {**_D0, "curve": (1e-8, 1e-6, 1e-4, 1e-2)}
CORRECTED = Variant("prodigy-corrected", "Prodigy, bias-corrected", "prodigy-corrected", **_COARSE)
RIVALS = (
    Variant("prodigy", "Prodigy", "prodigy", in_jax=True, **_D0),
    CORRECTED,
    Variant("prodigy-schedule-free", "Prodigy + schedule-free", "prodigy-schedule-free", **_D0),
    Variant("d-adaptation", "D-Adaptation (Adam)", "d-adaptation", in_jax=True, **_COARSE),
    Variant("schedule-free", "Schedule-free AdamW", "schedule-free", in_jax=True, curve=(1e-6, *LADDER)),
    Variant(
        "mechanic", "Mechanic (AdamW)", "mechanic", starts=(1e-8,), curve=_COARSE["curve"], knob="s_init", in_jax=True
    ),
    Variant("dog", "L-DoG, averaged", "dog", starts=(1e-6,), curve=_COARSE["curve"], knob="r_ε", in_jax=True),
    Variant("automagic-v3", "Automagic v3", "automagic-v3", starts=(1e-6,), curve=PICTURED, knob="starting rate"),
)
"""What finds its rate itself, and schedule-free AdamW: `starts` are their defaults."""

ON_MATRICES: Mapping[str, Any] = {"spatial_scope": "all"}
"""What makes the edge and frequency stages act on matrices."""

PARTS = (
    _tuned("no-torque", "without torque", {"torque": False}),
    _tuned("hard-mask", "Cautious' hard mask in place of torque", swaps=("hard-mask",)),
    _tuned("no-confidence", "without confidence", swaps=("no-confidence",)),
    _tuned("spatial", "with the spatial factor", {"spatial_awareness": True}),
    _tuned("background", "with background decay", {"background_regularization": True}),
    _tuned("row-mask", "with the row mask", {"lr_mask_gain": 0.2}),
    _tuned("no-edges", "without edges", {"edge_suppression": False}),
    _tuned("no-frequency", "without frequency", {"frequency_penalty": 0.0}),
    _tuned("low-rank", "with low rank", {"lora_rank_penalty": True}),
    _tuned("emphasis", "with `low_rank_emphasis` 1.2", {"lora_rank_penalty": True, "low_rank_emphasis": 1.2}),
    _tuned("on-matrices", "with edges and frequency on matrices", ON_MATRICES),
)
"""Each part switched alone, at the rate of `TUNED`."""

STAGES = ("edges", "frequency", "low-rank")
PLAIN = _tuned("no-stages", "without stages", {"edge_suppression": False, "frequency_penalty": 0.0,
                                               "lora_rank_penalty": False})  # fmt: skip
STAGED: Mapping[str, tuple[Variant, Variant]] = {
    stage: (
        _tuned(f"{stage}-only", f"{stage} alone", {**PLAIN.fields, **default, **ON_MATRICES}),
        _tuned(f"{stage}-strong", "with " + ", ".join(f"`{k}` {v}" for k, v in strong.items()),
               {**PLAIN.fields, **default, **strong, **ON_MATRICES}),
    )
    for stage, default, strong in (
        ("edges", {"edge_suppression": True}, {"edge_penalty": 0.2, "edge_threshold": 0.0}),
        ("frequency", {"frequency_penalty": 0.05}, {"frequency_penalty": 1.0}),
        ("low-rank", {"lora_rank_penalty": True}, {"rank_penalty_strength": 0.1}),
    )
}  # fmt: skip
"""Each stage alone at its default strength and far above it, at the rate of `TUNED`."""

PROFILES = ("memory_optimized", "balanced", "quality_optimized")
THIRTY_TWO = "-32bit"
"""What the name of a profile's 32-bit partner ends with."""
PROFILED = tuple(
    Variant(name, f"`{name}`", fields={"profile": name}, starts=(START,)) for name in PROFILES if name != OURS.name
)
PARTNERS = tuple(
    Variant(name + THIRTY_TWO, f"`{name}`, 32-bit", fields={"profile": name, "optim_bits": 32}, starts=(START,))
    for name in PROFILES
)
CLIPPED = _ours("percentile-95", "with percentile clipping at 95", {"percentile_clipping": 95}, starts=(START,))
OTHERS = (Variant("adamw8bit", "AdamW8bit (bitsandbytes)", "adamw8bit"), Variant("came", "CAME", "came"))
"""Not rate-free: for memory and loss at their best rate."""

VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        ADAMW, OURS, *RIVALS, TUNED, CAUTIOUS, *PARTS, PLAIN, *(v for pair in STAGED.values() for v in pair),
        *PROFILED, *PARTNERS, CLIPPED, *OTHERS,
    )
}  # fmt: skip
