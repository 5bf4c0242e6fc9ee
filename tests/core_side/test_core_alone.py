"""`automagic_core` needs numpy only, and its small tools say what they say."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from automagic_core import ArrayMemory, Config, Layout, decay, memory_report, state_plan
from automagic_core.arrays.state_forms import state_forms

BLOCKED = """
import sys
for name in ("torch", "jax", "jaxlib", "optax", "flax", "bitsandbytes", "automagic_torch", "automagic_optax"):
    sys.modules[name] = None  # an import of it now raises ImportError
import automagic_core
automagic_core.Config(profile="balanced")
automagic_core.dynamic_codebook(True)
automagic_core.random_unit(1, 0, 5)
print("alone")
"""


def test_import_without_any_framework() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "alone", done.stderr


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999999])
def test_decay_keeps_digits_that_float32_would_lose(beta: float) -> None:
    constants = decay(beta)
    assert constants.beta == beta
    assert constants.complement == 1 - beta
    # 1 − βᵗ by expm1 in float64 against the direct power: equal up to float64 rounding (1e-16 / (1 − β)).
    assert -math.expm1(7 * constants.log) == pytest.approx(1 - beta**7, rel=1e-8)


def test_decay_of_zero() -> None:
    assert -math.expm1(0 * decay(0.0).log) == 0  # 0⁰ = 1
    assert -math.expm1(1 * decay(0.0).log) == 1


def test_memory_report_adds_up() -> None:
    report = memory_report([ArrayMemory(1000, True, 2050), ArrayMemory(24, False, 300)], shared_bytes=8)
    assert report == {
        "total_parameters": 1024,
        "8bit_parameters": 1000,
        "32bit_parameters": 24,
        "memory_saved_mb": (8 * 1024 - 2358) / 1e6,
        "compression_ratio": 1000 / 1024,
        "state_bytes": 2358,
        "adam_state_bytes": 8192,
        "state_bytes_per_parameter": 2358 / 1024,
    }
    empty = memory_report([], shared_bytes=8)
    assert (empty["compression_ratio"], empty["state_bytes_per_parameter"], empty["state_bytes"]) == (0, 0, 8)


@pytest.mark.parametrize(
    ("shape", "fields", "expected"),
    [
        ((32, 32), {}, True),
        ((31, 33), {}, False),  # 1023 elements
        ((31, 33), {"min_8bit_size": 1023}, True),
        ((32, 32), {"optim_bits": 32}, False),
        ((1024,), {}, True),
    ],
)
def test_which_arrays_are_8_bit(shape: tuple[int, ...], fields: dict, expected: bool) -> None:
    config = Config(**fields)
    assert state_plan(shape, config, "flax").quantized is expected
    assert state_plan(shape, config, "flax", eight_bit=False).quantized is False
    assert state_plan(shape, config, "flax", embedding=True).quantized is expected
    config.stable_emb = True
    assert state_plan(shape, config, "flax", embedding=True).quantized is False
    assert state_plan(shape, config, "flax", embedding=False).quantized is expected


@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("shape", [(64, 1000), (1000, 64), (65, 65), (64, 64), (16, 8, 3, 3), (1, 5000), (0, 3)])
def test_the_parts_of_moments(shape: tuple[int, ...], layout: Layout) -> None:
    for factored in ("none", "second_moment", "all"):
        plan = state_plan(shape, Config(factored=factored, min_8bit_size=1), layout)
        rows, columns = math.prod(plan.row_shape), math.prod(plan.column_shape)
        assert plan.narrow is (min(rows, columns) <= 64)
        squares, residuals = plan.parts("exp_avg_sq"), plan.parts("exp_avg_res")
        assert plan.parts("exp_avg") == {"exp_avg": (shape, plan.quantized)}
        if factored == "none":
            assert squares == {"exp_avg_sq": (shape, plan.quantized)}
            assert residuals == {"exp_avg_res": (shape, plan.quantized)}
            continue
        long = "exp_avg_sq_row" if rows > columns else "exp_avg_sq_col"
        coded = {name for name, part in squares.items() if part.coded}
        assert coded == ({long} if plan.narrow and plan.quantized else set())
        assert {name: part.shape for name, part in squares.items()} == {
            "exp_avg_sq_row": plan.row_shape,
            "exp_avg_sq_col": plan.column_shape,
        }
        if plan.narrow:
            ((name, part),) = residuals.items()
            assert not part.coded
            assert math.prod(part.shape) == min(rows, columns)
            assert name == ("exp_avg_res_col" if rows > columns else "exp_avg_res_row")
        else:
            assert len(residuals) == (2 if factored == "all" else 1)


@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
def test_which_states_an_array_keeps(factored: str) -> None:
    config = Config(factored=factored, torque_decay=0.5, lr_mask_gain=0.2)
    matrix, vector = state_plan((65, 66), config, "flax"), state_plan((6,), config, "flax")
    assert matrix.factored_sq is (factored != "none")
    assert matrix.factored_res is (factored == "all")
    assert not vector.factored_sq
    assert not vector.factored_res
    assert matrix.has_background_scale is (factored == "none")
    assert vector.has_background_scale
    assert matrix.has_s
    assert matrix.votes
    assert matrix.has_walk
    assert vector.has_walk
    assert (matrix.row_count, vector.row_count) == (66, 1)
    assert (matrix.has_lr_mask, vector.has_lr_mask) == (True, False)
    assert (matrix.has_spatial_variance, vector.has_spatial_variance) == (True, False)
    assert matrix.columns == 65
    assert state_plan((65, 66), config, "torch").columns == 66

    plain = Config(search_gain=0, spatial_awareness=False, background_regularization=False)
    plan = state_plan((65, 66), plain, "flax")
    kept = (plan.has_s, plan.votes, plan.has_walk, plan.has_lr_mask)
    assert not any((*kept, plan.has_spatial_variance, plan.has_background_scale))
    no_warmup = state_plan((4, 6), Config(torque_decay=0.5, warmup_steps=0, lr_mask_gain=0.2), "flax")
    assert not no_warmup.has_s
    assert not no_warmup.votes
    assert not no_warmup.has_walk
    assert no_warmup.has_lr_mask
    assert not state_plan((4, 6), Config(torque=False, torque_decay=0.5), "flax").has_s


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (True, True, False)),
        ({"agreement_floor": -1}, (True, False, False)),
        ({"agreement_floor": -1.0, "lr_mask_gain": 0.2}, (True, True, True)),
        ({"search_gain": 0}, (False, False, False)),
        ({"search_gain": 0.0, "lr_mask_gain": 0.2}, (False, True, True)),
    ],
)
def test_what_is_off_in_the_search_has_no_state(fields: dict, expected: tuple[bool, ...]) -> None:
    plan = state_plan((4, 6), Config(**fields), "torch")
    assert (plan.has_walk, plan.votes, plan.has_lr_mask) == expected
    assert "walk" not in state_forms(plan, warming=False)


@pytest.mark.parametrize(("warmup", "ramp"), [(0, 0), (1, 1), (4, 1), (5, 2), (500, 125)])
def test_the_ramp_is_a_quarter_of_the_warm_up_rounded_up_and_a_search_has_none(warmup: int, ramp: int) -> None:
    assert Config(warmup_steps=warmup, search_gain=0).ramp_steps == ramp
    assert Config(warmup_steps=warmup).ramp_steps == 0
