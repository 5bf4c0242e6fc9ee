"""The valid values of every field of `Config`, and their wording in error messages (docs/algorithm.md, section 7.1)."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from automagic_core.config.constants import MAX_STEP

_LARGEST = float(np.finfo(np.float32).max)
"""Of float32, in which arrays compute with the fields.  What is larger, infinite or NaN is not finite there."""


class Range(NamedTuple):
    """A check of a value, and the wording of what is valid."""

    accepts: Callable[[Any], bool]
    text: str


def is_checkable(value: Any) -> bool:
    """Whether `value` is a plain Python or numpy number, whose value is known now."""
    return isinstance(value, numbers.Number)


def known(value: Any) -> Any:
    """The Python number in an array of no dimensions that has a value; anything else, a traced array too, as it is."""
    if is_checkable(value) or getattr(value, "shape", None) != ():
        return value
    try:
        # Not `float(value)`: while JAX forms a derivative outside of jit, it would give the value and lose the rest.
        return _shortest(value.item() if hasattr(value, "detach") else np.asarray(value, np.float64).item())
    except Exception:  # every library has errors of its own for arrays without values
        return value


def known_integer(value: Any) -> Any:
    """The Python integer or boolean in an array of no dimensions that has a value; anything else as it is."""
    if getattr(value, "shape", None) != ():
        return value
    try:
        found = value.item()
    except Exception:  # as above
        return value
    return found if isinstance(found, int) else value


def _shortest(value: Any) -> float:
    """The same number; for a number of float32 the one with fewest digits that is the same there, as 0.2."""
    number = float(value)
    with np.errstate(over="ignore"):
        single = np.float32(number)
    return float(str(single)) if float(single) == number else number


def _is_array(value: Any) -> bool:
    # The value of a tensor or of a traced array is not known here, so its range cannot be checked.
    return not is_checkable(value) and hasattr(value, "dtype") and hasattr(value, "shape")


def _real(accepts: Callable[[float], bool], text: str, *, from_array: bool = True) -> Range:
    def check(value: Any) -> bool:
        if _is_array(value):
            return from_array
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return False
        try:
            number = _shortest(value)
        except OverflowError:  # an integer beyond float64
            return False
        return abs(number) <= _LARGEST and accepts(number)

    return Range(check, text)


def _integer(accepts: Callable[[int], bool], text: str) -> Range:
    def check(value: Any) -> bool:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and accepts(int(value))

    return Range(check, text)


def _one_of(*choices: Any) -> Range:
    text = ", ".join("None" if choice is None else str(choice) for choice in choices)
    return Range(lambda value: any(type(value) is type(c) and value == c for c in choices), text)


_SWITCH = Range(lambda value: isinstance(value, bool), "True, False")
_POSITIVE = _real(lambda x: float(np.float32(x)) > 0, "a finite number > 0 in float32")
_LIMIT = _real(lambda x: float(np.float32(x)) > 0, "0 < min_lr ≤ max_lr in float32")
# Its constants are formed in float64, so a traced array cannot be one.
_BETA = _real(lambda x: 0 <= x < 1, "[0, 1)", from_array=False)


def is_sequence(value: Any) -> bool:
    """Whether `value` holds several values in order: a tuple, an array with one axis, a list of OmegaConf's."""
    return (isinstance(value, Sequence) and not isinstance(value, str)) or len(getattr(value, "shape", ())) == 1


def _are_betas(value: Any) -> bool:
    return is_sequence(value) and len(value) == 3 and all(map(_BETA.accepts, value))


RANGES: dict[str, Range] = {
    "lr": Range(lambda x: callable(x) or _POSITIVE.accepts(x), "a number in [min_lr, max_lr], in JAX also a schedule"),
    "min_lr": _LIMIT,
    "max_lr": _LIMIT,
    "weight_decay": _real(lambda x: x >= 0, "a finite number ≥ 0 in float32"),
    # Less than the last value of the step counter, so that a warm-up always ends.
    "warmup_steps": _integer(lambda n: 0 <= n < MAX_STEP, f"an integer in [0, {MAX_STEP - 1}]"),
    "betas": Range(_are_betas, "three numbers, each in [0, 1)"),
    "update_clip": _POSITIVE,
    "confidence_floor": _POSITIVE,
    "factored": _one_of("none", "second_moment", "all"),
    "torque": _SWITCH,
    "torque_decay": _BETA,
    "search_gain": _real(lambda x: x >= 0, "a finite number ≥ 0 in float32 (0: search off)"),
    "straightness": _POSITIVE,
    "agreement_floor": _real(lambda x: -1 <= x <= 1, "[-1, 1] (-1: agreement is not asked for)"),
    "lr_mask_gain": _real(lambda x: x >= 0, "a finite number ≥ 0 in float32 (0: no rates of rows)"),
    "optim_bits": _integer(lambda n: n in (8, 32), "8 or 32"),
    "min_8bit_size": _integer(lambda n: n >= 1, "an integer ≥ 1"),
    "percentile_clipping": _integer(lambda n: 1 <= n <= 100, "an integer in [1, 100]"),
    "block_size": _integer(lambda n: 64 <= n <= 4096 and n & (n - 1) == 0, "a power of two in [64, 4096]"),
    "block_wise": _SWITCH,
    "stable_emb": _SWITCH,
    "force_8bit": _SWITCH,
    "stochastic_rounding": _SWITCH,
    "stochastic_rounding_params": _SWITCH,
    "spatial_scope": _one_of("conv", "all"),
    "edge_suppression": _SWITCH,
    "edge_penalty": _real(lambda x: 0 <= x <= 0.2, "[0, 0.2]"),
    "edge_threshold": _real(lambda x: x >= 0, "a finite number ≥ 0 in float32"),
    "background_regularization": _SWITCH,
    "spatial_awareness": _SWITCH,
    "frequency_penalty": _real(lambda x: 0 <= x <= 1, "[0, 1]"),
    "lora_rank_penalty": _SWITCH,
    "rank_penalty_strength": _real(lambda x: 0 <= x < 1, "[0, 1)"),
    "low_rank_emphasis": _real(lambda x: x >= 1, "a finite number ≥ 1 in float32"),
    "profile": _one_of(None, "memory_optimized", "balanced", "quality_optimized"),
    "verbose": _SWITCH,
}
