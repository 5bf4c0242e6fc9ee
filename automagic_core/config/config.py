"""`Config`: every hyperparameter with its default and its check (docs/algorithm.md, section 7)."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from automagic_core.config.constants import SEARCH_START, SHORT_SEARCH
from automagic_core.config.not_here import INSTEAD
from automagic_core.config.ranges import RANGES, is_checkable, is_sequence, known, known_integer

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "memory_optimized": {
        "factored": "all",
        "min_8bit_size": 1024,
        "force_8bit": True,
        "edge_suppression": False,
        "frequency_penalty": 0.0,
        "spatial_awareness": False,
        "background_regularization": False,
        "lora_rank_penalty": False,
    },
    "balanced": {
        "factored": "second_moment",
        "min_8bit_size": 1024,
        "spatial_awareness": False,
        "background_regularization": False,
        "lora_rank_penalty": False,
    },
    "quality_optimized": {
        "factored": "none",
        "edge_penalty": 0.15,
        "frequency_penalty": 0.08,
    },
}
"""The fields that each profile sets; every other field keeps its default."""

_CHANGING = ("lr", "weight_decay")
"""Fields whose tensors and JAX arrays stay: torch's schedulers fill them, and inject_hyperparams makes them anew."""


@dataclasses.dataclass(init=False)
class Config:
    """Every hyperparameter of the optimizer.

    Fields given beside a profile win over it, so ``Config(**other.__dict__)`` is a copy of `other`.  The object can be
    changed; `validate` then checks it again.  A number in an array of no dimensions becomes a Python number, except in
    `lr` and `weight_decay`, whose arrays change during a run.

    Args:
        **fields: any of the fields below, by name.

    Raises:
        ValueError: an unknown name or a value outside its range; the message names the field, the value and the range.

    Example:
        >>> Config(profile="memory_optimized", min_8bit_size=2048).factored
        'all'
    """

    lr: float | Callable[[int], float] = 1e-6
    min_lr: float = 1e-7
    max_lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup_steps: int = 500
    betas: tuple[float, float, float] = (0.9, 0.99, 0.999)
    update_clip: float = 3.0
    confidence_floor: float = 0.01
    factored: str = "second_moment"
    torque: bool = True
    torque_decay: float = 0.0
    search_gain: float = 0.5
    straightness: float = 1.2
    agreement_floor: float = -0.1
    lr_mask_gain: float = 0.0
    optim_bits: int = 8
    min_8bit_size: int = 1024
    percentile_clipping: int = 100
    block_size: int = 256
    block_wise: bool = True
    stable_emb: bool = False
    force_8bit: bool = False
    stochastic_rounding: bool = True
    stochastic_rounding_params: bool = True
    spatial_scope: str = "conv"
    edge_suppression: bool = True
    edge_penalty: float = 0.1
    edge_threshold: float = 0.6
    background_regularization: bool = True
    spatial_awareness: bool = True
    frequency_penalty: float = 0.05
    lora_rank_penalty: bool = True
    rank_penalty_strength: float = 0.003
    low_rank_emphasis: float = 1.0
    profile: str | None = None
    verbose: bool = False

    def __init__(self, **fields: Any) -> None:
        check_names(fields)
        if "profile" in fields:
            check_field("profile", fields["profile"])
        profile = PROFILES.get(fields.get("profile") or "", {})
        defaults = {field.name: field.default for field in dataclasses.fields(type(self))}
        for name, value in {**defaults, **profile, **fields}.items():
            setattr(self, name, value)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        default = getattr(type(self), name, None)
        if name == "betas" and is_sequence(value):
            value = tuple(map(known, value))
        elif isinstance(default, float) and (name not in _CHANGING or isinstance(value, np.ndarray)):
            value = known(value)
        elif isinstance(default, int):  # or a boolean
            value = known_integer(value)
        if isinstance(value, numbers.Integral) and not isinstance(value, bool):
            value = int(value)  # numpy's small integers overflow where sizes are computed
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Raises a ValueError if any field lies outside its range.

        Traced arrays, schedules, and tensors as `lr` or `weight_decay` are not checked: their values are not known yet.
        """
        for name in FIELD_NAMES:
            check_field(name, getattr(self, name))
        if is_checkable(self.min_lr) and is_checkable(self.max_lr) and self.min_lr > self.max_lr:
            raise ValueError(f"min_lr = {self.min_lr!r} is above max_lr = {self.max_lr!r}; valid: 0 < min_lr ≤ max_lr")
        lr: Any = self.lr
        if all(map(is_checkable, (lr, self.min_lr, self.max_lr))) and not self.min_lr <= lr <= self.max_lr:
            raise ValueError(
                f"lr = {self.lr!r} is outside [min_lr, max_lr] = [{self.min_lr!r}, {self.max_lr!r}]; "
                "widen the limits, they are never applied silently to a constant lr"
            )

    @property
    def absmax_block_size(self) -> int | None:
        """Elements per block, or None where the whole array is one block."""
        return self.block_size if self.block_wise else None

    @property
    def ramp_steps(self) -> int:
        """The steps in which the rate rises to η₀: a quarter of the warm-up, rounded up; 0 with the search on."""
        return 0 if self.searches else -(-self.warmup_steps // 4)

    @property
    def searches(self) -> bool:
        """The rate search is on."""
        return self.warmup_steps > 0 and not _is_plainly(self.search_gain, 0)

    @property
    def climbs(self) -> bool:
        """The search asks for agreement, and so begins with a climb."""
        return self.searches and not _is_plainly(self.agreement_floor, -1)

    def advice(self) -> Iterator[tuple[str, str]]:
        """What to warn somebody of who makes an optimizer with these fields: a name and a sentence each."""
        if self.climbs and self.warmup_steps < SHORT_SEARCH:
            yield (
                "short search",
                f"warmup_steps = {self.warmup_steps} is too short for the rate search, which begins at {SEARCH_START} "
                f"or lower and climbs for about {SHORT_SEARCH} steps; give it 40 % of the run, or search_gain=0 to "
                "train with lr as it is",
            )

    @property
    def masks_rows(self) -> bool:
        """Rows have rates of their own."""
        return not _is_plainly(self.lr_mask_gain, 0)

    @property
    def votes(self) -> bool:
        """Gradients are compared with the momentum while warming up."""
        return self.climbs or (self.warmup_steps > 0 and self.masks_rows)

    @property
    def clips_by_percentile(self) -> bool:
        """Stage 1 is on."""
        return not _is_plainly(self.percentile_clipping, 100)

    @property
    def suppresses_edges(self) -> bool:
        """Stage 2 is on.  Where the strength is not known yet (a traced array), it counts as on."""
        return self.edge_suppression and not _is_plainly(self.edge_penalty, 0)

    @property
    def suppresses_frequencies(self) -> bool:
        """Stage 3 is on."""
        return not _is_plainly(self.frequency_penalty, 0)

    @property
    def encourages_low_rank(self) -> bool:
        """Stage 4 is on, for adapters."""
        changes = not (_is_plainly(self.rank_penalty_strength, 0) and _is_plainly(self.low_rank_emphasis, 1))
        return self.lora_rank_penalty and changes


FIELD_NAMES: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Config))
"""The names of all fields of `Config`, in their order (docs/algorithm.md, section 7.1)."""


def check_names(fields: Mapping[str, Any]) -> None:
    """Raises a ValueError with a line for every unknown field: what to use instead, or the nearest known one."""
    unknown = [(name, value) for name, value in fields.items() if name not in FIELD_NAMES]
    if unknown:
        raise ValueError("\n".join(f"unknown field {name} = {value!r}; {_hint(name)}" for name, value in unknown))


def _hint(name: str) -> str:
    if name in INSTEAD:
        return INSTEAD[name]
    near = difflib.get_close_matches(name, FIELD_NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}valid: {', '.join(FIELD_NAMES)}"


def check_field(name: str, value: Any, argument: str | None = None) -> None:
    """Raises a ValueError that names the field, the value and the range if the value is outside it.

    Args:
        name: of the field.
        value: which is to be checked.
        argument: the name to tell, where a function calls the field otherwise.
    """
    rule = RANGES[name]
    if not rule.accepts(value):
        raise ValueError(f"{argument or name} = {value!r} is not valid; valid: {rule.text}")


def _is_plainly(value: Any, number: float) -> bool:
    return is_checkable(value) and bool(value == number)
