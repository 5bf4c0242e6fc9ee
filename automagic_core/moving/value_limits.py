"""The range of each state's values; values outside it mean a damaged file (docs/algorithm.md, section 6.4)."""

from __future__ import annotations

import numpy as np

from automagic_core.arrays.state_forms import COMPANDED, SLOTS, moment_of
from automagic_core.config.constants import GRADIENT_LIMIT, MAX_STEP, ROW_LIMIT

_ROUNDING = 1.01
"""Rounding to float32 and 8 bits may exceed a bound by this factor."""
_MAGNITUDE = 1e3 * GRADIENT_LIMIT
"""Bound of values in the unit of a gradient; the stages may make a gradient larger than `GRADIENT_LIMIT`."""

LIMITS: dict[str, tuple[float, float]] = {
    # `update_clip` bounds the momentum, but can have any value; up to this limit (u − m̂)² stays in float32.
    "exp_avg": (-GRADIENT_LIMIT, GRADIENT_LIMIT),
    "exp_avg_sq": (0.0, _MAGNITUDE**2),
    "exp_avg_res": (0.0, _MAGNITUDE**2),
    "s": (-_ROUNDING, _ROUNDING),
    "lr_mask": (-ROW_LIMIT * _ROUNDING, ROW_LIMIT * _ROUNDING),
    "spatial_variance": (0.0, _MAGNITUDE**2),
    "edge_history": (0.0, _MAGNITUDE),
    "background_scale": (0.0, _MAGNITUDE),
    "torque_mean": (1 - _ROUNDING, _ROUNDING),
    "age": (0, MAX_STEP),
    "skipped_steps": (0, MAX_STEP),
    "walk": (-_MAGNITUDE, _MAGNITUDE),
    "log_rate_scale": (-88.0, 88.0),  # exp ℓ stays in float32
    "walk_energy": (0.0, float(np.finfo(np.float32).max)),
    "agreement": (-_ROUNDING, _ROUNDING),
    "peak_agreement": (-_ROUNDING, _ROUNDING),
    "first_norm": (0.0, float(np.finfo(np.float32).max)),
    "gradient_norm": (0.0, float(np.finfo(np.float32).max)),
    "norm_history": (0.0, float(np.finfo(np.float32).max)),
}
"""By state: the least and the largest value that a run can have written, or beyond."""


def limits(key: str) -> tuple[float, float] | None:
    """The valid range of a saved tensor by its name; None where every value of its dtype is valid.

    Args:
        key: a state's name, which may end in ``_absmax``, ``_row`` or ``_col``.
    """
    name = moment_of(key)
    if not key.endswith("_absmax"):
        return LIMITS.get(name)
    if name not in SLOTS:
        return None
    largest = LIMITS[name][1]
    return 0.0, largest**0.5 if name in COMPANDED else largest


def check_range(least: float, largest: float, key: str, owner: str) -> None:
    """Raises a ValueError that names the state if a value lies outside its range or is NaN.

    Args:
        least, largest: the least and the largest value; NaN where a value is NaN.
        key: the state's name.
        owner: the parameter or group in the message.
    """
    allowed = limits(key)
    if allowed is not None and not allowed[0] <= least <= largest <= allowed[1]:  # NaN compares as False
        raise ValueError(
            f"{owner} has {key} with values from {least:g} to {largest:g}; "
            f"valid: {allowed[0]:g} to {allowed[1]:g}; the file may be damaged"
        )
