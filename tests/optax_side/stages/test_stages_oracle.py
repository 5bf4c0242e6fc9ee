"""The gradient stages (section 4) against the float64 oracle: alone, in pairs, all in the whole optimizer."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import jax
import numpy as np
import pytest

from automagic_optax import ClipByPercentileState, SuppressEdgesState, clip_by_percentile, encourage_low_rank
from tests.optax_side.oracle_runs import EVERYTHING, WHOLE, is_noticed, relative, run, worst_errors
from tests.optax_side.small import assert_same_bits, same_but_for_nans
from tests.optax_side.stage_runs import ABSENT, FEW, FIELDS, KINDS, NAMES, SPOILT, StageRun, states_of, weight_of
from tests.oracle import stages as oracle
from tests.oracle.settings import STAGES_OFF

pytestmark = pytest.mark.compiled_quickly
# Some ten float32 roundings in each stage, an FFT of up to 63 numbers, and in the ring a sum of up to 500 squares; with
# rho = 0.3 stage 4 may be further off where W has very weak directions, which none of KINDS' weights has.
TOLERANCE = 3e-6


def run_stages(names: tuple[str, ...], layout: str, jit: bool) -> StageRun:
    """Four steps: the second with gradients that are not finite, the third (only if not compiled) without some."""
    # Operation by operation every shape of every operation is a program of its own.
    stages = StageRun(names, layout, KINDS if jit else FEW, jit=jit)
    stages.step(stages.gradients())

    before = stages.state
    grads = stages.gradients(0.5)
    for i in SPOILT:
        grads[i][(-1,) * grads[i].ndim] = np.nan if i % 2 else np.inf
    passed = stages.step(grads)
    for old, new in zip(*(states_of(s, SuppressEdgesState) for s in (before, stages.state)), strict=True):
        for i in SPOILT:
            assert_same_bits((new.age[i], new.edge_history[i]), (old.age[i], old.edge_history[i]))
    for old, new in zip(*(states_of(s, ClipByPercentileState) for s in (before, stages.state)), strict=True):
        assert_same_bits(new._replace(energy_removed=old.energy_removed), old)
        if names == ("clip",):
            assert all(map(same_but_for_nans, passed, grads))

    for size, absent in ((3.0, ABSENT), (1.2, ())):
        grads = stages.gradients(size)
        stages.step([None if i in absent and not jit else g for i, g in enumerate(grads)])
    return stages


@pytest.mark.parametrize(
    ("layout", "jit"),
    [pytest.param("torch", True, marks=pytest.mark.slow), ("flax", True), ("flax", False)],
    ids=["torch-compiled", "flax-compiled", "flax-operation by operation"],
)
@pytest.mark.parametrize("name", NAMES)
def test_stage_alone(name: str, jit: bool, layout: str) -> None:
    stages = run_stages((name,), layout, jit)
    assert max(stages.worst.values()) <= TOLERANCE, stages.worst
    states = {"clip": {"norm_history"}, "edges": {"edge_history"}}
    assert set(stages.worst) == {"gradient"} | states.get(name, set())
    assert stages.changed > 0.05  # of an array's norm: it does something


@pytest.mark.parametrize("names", list(combinations(NAMES, 2)), ids="-".join)
def test_pairs(names: tuple[str, ...]) -> None:
    # Operation by operation, whose kernels the tests of single stages have compiled.
    stages = run_stages(names, "flax", jit=False)
    assert max(stages.worst.values()) <= TOLERANCE, stages.worst


def test_the_arrays_are_what_they_are_meant_to_be() -> None:
    pictures = [kind for kind in KINDS if oracle.spatial_axes(kind.shape, "torch") is not None]
    assert {len(kind.shape) for kind in pictures} == {2, 4, 5}
    assert {len(kind.shape) - 2 for kind in KINDS if len(kind.shape) > 2} == {1, 2, 3}
    assert {n for kind in KINDS for n in kind.shape} >= {0, 1, 2, 3, 5, 7}
    assert max(KINDS.count(kind) for kind in KINDS) == 3


@pytest.mark.parametrize("percentile", [1, 60, 95, 99, 100])
def test_percentiles_over_more_steps_than_the_ring_holds(percentile: int) -> None:
    rng = np.random.default_rng(percentile)
    tx, theirs = clip_by_percentile(percentile), oracle.PercentileClip(percentile)
    update = jax.jit(tx.update)
    state, clipped, bad_values = tx.init(None), 0, (np.nan, np.inf)
    for step in range(250):
        grads = [(10 ** rng.uniform(-2, 2) * rng.standard_normal(s)).astype(np.float32) for s in ((3, 4), (5,), ())]
        if step % 17 == 0:
            # Zero everywhere, or one array that is not finite: neither is recorded, and nothing is clipped.
            grads = (
                [0 * g for g in grads]
                if step % 2
                else [grads[0], np.full_like(grads[1], bad_values[step % 4 // 2]), grads[2]]
            )
        bad = [not np.isfinite(g).all() for g in grads]
        wide = [None if b else g.astype(np.float64) for g, b in zip(grads, bad, strict=True)]
        expected, before = theirs(wide, bad), state
        ours, state = update(grads, state)
        for mine, right, g in zip(ours, expected, grads, strict=True):
            assert right is None or relative(mine, right) < 1e-6  # a float32 sum and a root
            clipped += right is not None and bool(np.abs(right).sum() < np.abs(g).sum() * 0.999)
        if step % 17 == 0:
            assert_same_bits(state[:2], before[:2])
    # Entry 99 is the largest of the ring, this n² included: nothing is above it.
    assert (clipped > 10) == (percentile < 99)
    assert percentile == 100 or relative(np.sort(state.norm_history), np.sort(theirs.ring)) < 1e-6


SPECTRA = ("rank one", "exactly rank one", "half the rank", "repeated values", "full", "steep", "tiny", "huge")


SIZES = ((1, 1), (1, 7), (2, 3), (7, 5), (64, 64), (64, 96), (300, 256))
QUICK = ((1, 1), (2, 3), (7, 5), (64, 96))


# The layout decides about ties alone.
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        pytest.param(layout, shape, marks=() if shape in QUICK else pytest.mark.slow)
        for layout, shape in (("torch", (64, 64)), *(("flax", shape) for shape in SIZES))
    ],
)
def test_low_rank_is_a_float64_decomposition(shape: tuple[int, int], layout: Any) -> None:
    rng = np.random.default_rng(0)
    weights = [weight_of(kind, shape, rng) for kind in (*SPECTRA, "zero")]
    grads = [rng.standard_normal(shape).astype(np.float32) for _ in weights]

    @jax.jit
    def stage(strength: float, grads: Any, weights: Any) -> list[jax.Array]:
        tx = encourage_low_rank(strength, 1.2, layout=layout, lora=lambda path, leaf: True)
        return tx.update(grads, tx.init(weights), weights)[0]

    # At the default strength float32 accuracy is what counts.  At 0.3 the directions that eigh of a float32 Gram matrix
    # does not tell apart show: T weighs them up to ten times as much as strong ones.
    for strength, bound in ((0.01, 1e-5), (0.3, 2e-4)):
        for ours, g, w, kind in zip(stage(strength, grads, weights), grads, weights, (*SPECTRA, "zero"), strict=True):
            wide = (g.astype(np.float64), w.astype(np.float64))
            expected = oracle.encourage_low_rank(*wide, layout=layout, strength=strength, emphasis=1.2)
            assert relative(ours, expected) <= bound, (kind, strength)
            assert kind != "zero" or np.asarray(ours).tobytes() == g.tobytes()


# ---------------------------------------------------------------- all stages in the whole optimizer

STAGES_ON: dict[str, Any] = {**EVERYTHING, **FIELDS, "edge_suppression": True, "lora_rank_penalty": True}


# Operation by operation with two adapters in a batch, of which now and then one has no gradient, and one array alone.
@pytest.mark.parametrize(
    ("layout", "factored", "jit", "arrays"),
    [
        pytest.param("torch", "second_moment", True, WHOLE, marks=pytest.mark.slow),
        ("flax", "all", True, WHOLE),
        pytest.param("flax", "none", False, [1, 7, 9], marks=pytest.mark.slow),
    ],
    ids=["torch-second_moment-compiled", "flax-all-compiled", "flax-none-operation by operation"],
)
def test_the_whole_optimizer(layout: str, factored: str, jit: bool, arrays: list[int]) -> None:
    fields = {**STAGES_ON, "factored": factored}
    recorded = run(fields, layout, arrays=arrays, whole=True, absent=not jit, jit=jit, steps=24)
    errors = worst_errors(recorded)
    assert {"update", "edge_history", "exp_avg", "lr_mask"} <= set(errors)
    # As in test_oracle_everything: float32 roundings of many steps.
    assert max(errors.values()) <= 1e-5, errors
    assert sum(g is not None and not np.isfinite(g).all() for step in recorded.steps for g in step.grads) == 3
    # Each stage was compared: without it in the oracle the update differs.
    for stage in NAMES:
        assert is_noticed(recorded, 1e-3, disable={stage}), stage
    assert is_noticed(recorded, 1e-3, **STAGES_OFF)
