"""32-bit states: update and every state against the float64 oracle with everything on, and what would go unnoticed."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax.cameamp.states import WARM_UP_ONLY
from tests.optax_side.oracle_runs import (
    EMBEDDING,
    EVERYTHING,
    SHAPES,
    STEPS,
    TURNS,
    WITHOUT_ADAPTERS,
    Run,
    is_noticed,
    relative,
    run,
    to_flax,
    worst_errors,
)
from tests.oracle.cameamp import FEATURES

pytestmark = pytest.mark.compiled_quickly
FACTORED = ["none", "second_moment", "all"]
QUICK = FACTORED[:2]  # test_stages_oracle has the whole optimizer with all statistics factored
# float32 carries 6e-8 a rounding; fifty steps of some thirty roundings each, amplified by differences such as u − m̂
# and by the steep torque near 0, stay below 4e-6 here.
TOLERANCE = 1e-5


@cache
def recorded(factored: str, layout: str) -> Run:
    return run({**EVERYTHING, "factored": factored}, layout)


@pytest.mark.parametrize(
    ("factored", "layout"),
    [
        *((factored, "flax") for factored in QUICK),
        pytest.param("all", "flax", marks=pytest.mark.slow),
        *(pytest.param(factored, "torch", marks=pytest.mark.slow) for factored in FACTORED),
    ],
)
def test_update_and_every_state(factored: str, layout: str) -> None:
    errors = worst_errors(recorded(factored, layout))
    states = {"age", "skipped_steps", "torque_mean", "background_scale", "exp_avg", "exp_avg_sq", "exp_avg_res"}
    states |= {"s", "walk", "lr_mask", "spatial_variance"}
    assert set(errors) == {"update", *SEARCH_SCALARS} | states
    assert max(errors.values()) <= TOLERANCE, errors
    for name in ("age", "skipped_steps"):
        assert errors[name] == 0, name


def test_the_run_visits_what_it_is_meant_to() -> None:
    steps = recorded("second_moment", "flax").steps
    assert len(steps) == STEPS == 50
    last = steps[-1].states
    assert [int(state["skipped_steps"]) for state in last] == [0, 0, 0, 0, 0, 2, 2]
    assert [int(state["age"]) for state in last] == [49, 49, 49, 50, 50, 47, 48]
    assert sum(g is None for step in steps for g in step.grads) == 4
    assert last[2]["lr_mask"].any()
    assert all(all(state[name] is None for name in WARM_UP_ONLY) for state in last)
    # Each of `TURNS` ends the climb for a while, in which the rate rises by the walk.
    climbs = [bool(step.search.peak_agreement > 0) for step in steps[4:]]
    assert [climbing for climbing, _ in itertools.groupby(climbs)] == [True, False, True, False, True]
    found = [float(step.search.log_rate_scale) for step in steps]
    assert found[TURNS[0] - 1] < found[TURNS[0]] < found[TURNS[0] + 1] < found[-1] < 10


@pytest.mark.slow  # test_stages_oracle compares the whole optimizer compiled, parity each compiled step
def test_compiled_steps_are_the_same_mathematics() -> None:
    compiled = run({**EVERYTHING, "factored": "second_moment"}, "flax", absent=False, bad=False, jit=True)
    errors = worst_errors(compiled)
    assert max(errors.values()) <= TOLERANCE, errors


# Off in the oracle: the largest error of all quantities becomes at least this (measured: 0.02 for the row rates, which
# differ by a few per cent, and more than 0.1 for all others).
NOTICED = 1e-2


@pytest.mark.parametrize("feature", sorted(FEATURES - {"warmup_ramp"}))
def test_a_missing_feature_is_noticed_in_the_update(feature: str) -> None:
    for factored in QUICK:
        assert is_noticed(recorded(factored, "flax"), NOTICED, disable={feature}), factored


def test_without_the_search_there_is_a_ramp() -> None:
    off = run({**EVERYTHING, "search_gain": 0.0}, "flax", steps=8)
    errors = worst_errors(off)
    assert max(errors.values()) <= TOLERANCE, errors
    assert is_noticed(off, NOTICED, disable={"warmup_ramp"})


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "torch"},
        {"embedding": [False] * 7},
        {"decay_mask": [True] * 7},
        {"betas": (0.85, 0.95, 0.999)},
        {"betas": (0.85, 0.96, 0.99)},
        {"betas": (0.86, 0.95, 0.99)},
        {"confidence_floor": 0.01},
        {"update_clip": 3.0},
        {"torque_decay": 0.5},
        {"search_gain": 0.55},
        {"straightness": 0.95},
        {"agreement_floor": 0.07},
        {"lr_mask_gain": 0.21},
        {"min_lr": 5e-5},
        {"warmup_steps": 21},
        {"lr": 9.5e-5},
        {"weight_decay": 0.31},
    ],
    ids=str,
)
def test_a_different_hyperparameter_is_noticed_in_the_update(changes: dict) -> None:
    assert is_noticed(recorded("second_moment", "flax"), 1e2 * TOLERANCE, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("factored", FACTORED)
def test_the_layouts_agree_transposed(factored: str) -> None:
    # Float32 sums in another order: a few 1e-7.  The signs of the walk follow the order in memory, so no search.
    worst = 0.0
    fields = {**EVERYTHING, "factored": factored, "search_gain": 0.0}
    for a, b in zip(run(fields, "torch").steps, run(fields, "flax").steps, strict=True):
        worst = max(worst, relative(b.search.agreement, a.search.agreement))
        for i in WITHOUT_ADAPTERS:
            mark = EMBEDDING[i]
            if a.updates[i] is not None:
                worst = max(worst, relative(b.updates[i], to_flax(a.updates[i], mark)))
            for name in ("exp_avg", "spatial_variance"):
                if a.states[i][name] is not None:
                    worst = max(worst, relative(b.states[i][name], to_flax(a.states[i][name], mark)))
    assert worst <= 1e-6
    assert any(len(shape) >= 4 for shape in SHAPES)
