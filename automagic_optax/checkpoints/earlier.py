"""Brings the fields of a state that version 0.1.0 saved into today's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from automagic_core.arrays.state_forms import SEARCH_SCALARS


def with_search(fields: Mapping[str, Any], zero_walk: Any) -> dict[str, Any]:
    """The fields of a `ScaleByCameampState` with those of today's search; those of today stay as they are.

    ℓ was called `lr_scale`.  A run in the midst of its search goes on with the rate found so far and begins its walk
    here.  One that saved no signs of gradients had ended its search, and has no walk.

    Args:
        fields: by name.
        zero_walk: zeros for every array that has a walk; None where the search is off.
    """
    if "lr_scale" not in fields:
        return dict(fields)
    now = {"log_rate_scale" if name == "lr_scale" else name: value for name, value in fields.items()}
    walk = None if now.pop("last_polarity") is None else zero_walk
    zero = np.zeros_like(fields["lr_scale"])
    return {
        **now,
        **dict.fromkeys(SEARCH_SCALARS[1:], zero),
        "peak_agreement": zero - 1,
        "walk": walk,
        "last_polarity": None,
    }
