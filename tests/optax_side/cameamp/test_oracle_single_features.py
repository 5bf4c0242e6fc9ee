"""32-bit states: each feature alone against the float64 oracle."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import automagic_8bit, learning_rate
from tests.optax_side.oracle_runs import is_noticed, run, worst_errors
from tests.oracle.settings import STAGES_OFF

pytestmark = pytest.mark.compiled_quickly
PLAIN: dict[str, Any] = {
    "optim_bits": 32,
    "lr": 1e-3,
    "max_lr": 1.0,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "torque": False,
    "torque_decay": 0.0,
    "search_gain": 0.0,
    "straightness": 0.8,
    "agreement_floor": -1.0,
    "lr_mask_gain": 0.0,
    "background_regularization": False,
    "spatial_awareness": False,
    **STAGES_OFF,
}
ALONE: dict[str, dict[str, Any]] = {
    "ramp": {"warmup_steps": 20},
    "torque": {"torque": True},
    "torque_decay": {"torque": True, "warmup_steps": 30, "torque_decay": 0.8},
    "walk": {"warmup_steps": 30, "search_gain": 0.2},
    "straightness": {"warmup_steps": 30, "search_gain": 0.2, "straightness": 1.2},
    "agreement": {"warmup_steps": 30, "search_gain": 0.2, "agreement_floor": 0.2},
    "rows": {"warmup_steps": 30, "lr_mask_gain": 0.2},
    "spatial": {"spatial_awareness": True},
    "weight_decay": {"weight_decay": 0.3},
    "background": {"weight_decay": 0.3, "background_regularization": True},
}
# A vector, a matrix and a convolution; test_oracle_everything has all shapes.
ARRAYS = [1, 2, 4]


# test_oracle_everything notices each of them too, and has a ramp alone.  The background alone is computed otherwise
# where second moments are factored, and `walk` is what `straightness` changes.
QUICK = {(feature, "second_moment") for feature in ALONE if feature not in ("straightness", "background", "ramp")}
QUICK |= {("background", "none")}


@pytest.mark.parametrize(
    ("feature", "factored", "layout"),
    [
        pytest.param(
            feature,
            factored,
            layout,
            marks=() if (feature, factored) in QUICK else pytest.mark.slow,
        )
        for feature in ALONE
        for factored, layout in (("none", "torch"), ("second_moment", "flax"), ("all", "torch"))
    ],
)
def test_feature_alone(feature: str, factored: str, layout: str) -> None:
    recorded = run({**PLAIN, **ALONE[feature], "factored": factored}, layout, arrays=ARRAYS, seed=3)
    errors = worst_errors(recorded)
    # As in test_oracle_everything: float32 roundings of fifty steps.
    assert max(errors.values()) <= 1e-5, errors
    assert errors["update"] > 0
    # It is this feature that was compared: without it in the oracle the update differs.
    last = list(ALONE[feature])[-1]
    without = {last: PLAIN[last]}
    assert is_noticed(recorded, 1e-3, **without)


@pytest.mark.parametrize(
    "fields",
    [
        # Below min_lr, and past it: ℓ's limit counts from min_lr.
        {"lr": lambda count: 1e-9 * (count + 1), "min_lr": 1e-6, "max_lr": 1.5e-6},
        # Above max_lr, after a ramp from below it: ℓ's limit is 0, the array's rate the schedule's.
        {"lr": lambda count: 1e-2, "max_lr": 1e-3},
        # A rate of exactly 0 stays 0, at the start, in the warm-up and after it.
        {"lr": lambda count: 1e-4 * (count % 5), "max_lr": 1e-3},
    ],
    ids=["below min_lr", "above max_lr", "zeros"],
)
def test_rates_at_their_limits(fields: dict[str, Any]) -> None:
    warming = {"warmup_steps": 20, "search_gain": 0.2, "lr_mask_gain": 0.2, "weight_decay": 0.3}
    warming |= {"spatial_awareness": True}
    recorded = run({**PLAIN, **warming, **fields}, "flax", arrays=ARRAYS, seed=4)
    errors = worst_errors(recorded)
    assert max(errors.values()) <= 1e-5, errors
    sizes = [max(float(abs(u).max()) for u in step.updates if u is not None) for step in recorded.steps]
    rates = [float(fields["lr"](t)) for t in range(len(sizes))]
    assert all((size == 0) == (rate == 0) for size, rate in zip(sizes, rates, strict=True))


def test_without_a_search_limits_change_nothing() -> None:
    asked = jnp.array([0.0, 1e-10, 0.5, 1e-4], jnp.float32)
    weights, gradient = jnp.ones((3, 4)), jnp.arange(12.0).reshape(3, 4) - 5
    found = []
    for limits in ({"min_lr": 9e-5, "max_lr": 1.1e-4}, {"min_lr": 1e-12, "max_lr": 10.0}):
        tx = automagic_8bit(**{**PLAIN, **limits, "lr": asked.__getitem__, "spatial_awareness": True})
        state = tx.init(weights)
        for lr in asked:
            updates, state = tx.update(gradient, state, weights)
            found.append(updates)
            assert learning_rate(state) == lr
    assert all(np.array_equal(a, b) for a, b in zip(found[:4], found[4:], strict=True))
