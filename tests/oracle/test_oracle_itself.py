"""The oracle against numbers worked out by hand from ALGORITHM.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.oracle import codec
from tests.oracle.cameamp import CameampOracle
from tests.oracle.settings import FEATURES, STAGES, STAGES_OFF

F = np.float32


# ---------------------------------------------------------------- codec


def mix32_by_hand(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_random_unit_is_the_page_formula() -> None:
    assert codec.mix32([0, 1, 0xFFFFFFFF]).tolist() == [mix32_by_hand(v) for v in (0, 1, 0xFFFFFFFF)]
    step, slot, numel = 2**31 - 1, 3, 1000
    key = mix32_by_hand((step * 0x9E3779B9 + slot * 0x85EBCA6B + numel) % 2**32)
    expected = [(mix32_by_hand((i + key) % 2**32) >> 8) / 2**24 for i in range(numel)]
    r = codec.random_unit(step, slot, numel)
    assert r.dtype == F
    assert r.tolist() == expected
    assert codec.random_unit(step, slot, numel, [7, 999]).tolist() == [expected[7], expected[999]]
    assert abs(codec.random_unit(1, 0, 10**6).mean() - 0.5) < 2e-3


@pytest.mark.parametrize("signed", [True, False])
def test_nearest_is_nearest_and_ties_are_even(signed: bool) -> None:
    c, m = codec.codebook(signed), codec.midpoints(signed)
    assert c[127 if signed else 0] == 0
    assert c[255] == 1
    assert np.array_equal(codec.nearest(c, signed), np.arange(256))
    ties = codec.nearest(m, signed)
    assert np.all(ties % 2 == 0)
    assert np.all((ties == np.arange(255)) | (ties == np.arange(1, 256)))
    assert np.all(codec.nearest(np.nextafter(m, F(-2)), signed) == np.arange(255))
    assert np.all(codec.nearest(np.nextafter(m, F(2)), signed) == np.arange(1, 256))
    y = np.linspace(-1 if signed else 0, 1, 20001).astype(F)
    distance = np.abs(y[:, None].astype(np.float64) - c[None, :])
    chosen = distance[np.arange(y.size), codec.nearest(y, signed)]
    assert np.all(chosen <= distance.min(axis=1) + 7e-8)  # float32 midpoints are half an ulp off


def test_quantize_blocks_zeros_and_tiny_blocks() -> None:
    x = np.zeros(256 * 3 + 5, dtype=F)
    x[3], x[4] = -8, 4
    x[256] = 2.0**-121  # counts as zero
    x[512] = 2.0**-120  # does not
    x[-1] = 3  # short last block
    codes, absmax = codec.quantize(x, True, 256)
    assert absmax.tolist() == [8, 0, 2.0**-120, 3]
    assert codes[0] == 127
    assert codes[3] == 0
    assert codes[512] == 255
    assert codes[-1] == 255
    assert np.all(codes[256:512] == 0)
    back = codec.dequantize(codes, absmax, True, 256)
    assert np.all(back[256:512] == 0)
    assert np.all(np.signbit(back[256:512]))
    assert back[-1] == 3
    assert back[0] == 0
    assert abs(back[4] - 4) < 8 * 0.005
    assert back[3] == codec.codebook(True)[0] * 8 > -8  # the signed map ends at -0.993
    whole, one = codec.quantize(x.reshape(1, -1), False, None)
    assert one.tolist() == [8]
    assert whole.shape == (1, x.size)
    assert codec.quantize(np.zeros(0, F), True, 256)[1].shape == (0,)


def test_absmax_shape() -> None:
    assert codec.absmax_shape((3, 4, 512), 256) == (3, 4, 2)
    assert codec.absmax_shape((3, 500), 256) == (6,)
    assert codec.absmax_shape((), 256) == (1,)
    assert codec.absmax_shape((3, 512), None) == (1,)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_rounding_brackets_and_is_unbiased(signed: bool) -> None:
    c = codec.codebook(signed)
    x = np.full(2**20, c[200] * F(0.7) + c[201] * F(0.3), dtype=F)
    x[::256] = 1  # absmax 1 in every block
    codes, _ = codec.quantize_stochastic(x, signed, 256, step=9, slot=1)
    inner = np.arange(x.size) % 256 != 0
    assert set(codes[inner].tolist()) == {200, 201}
    assert np.all(codes[~inner] == 255)
    assert abs((codes[inner] == 201).mean() - 0.3) < 2e-3
    p = (x[1] - c[200]) / (c[201] - c[200])
    assert np.array_equal(codes[inner] == 201, (codec.random_unit(9, 1, x.size) < p)[inner])
    exact = np.tile(c, 16)
    assert np.array_equal(codec.quantize_stochastic(exact, signed, 256, 1, 0)[0], np.tile(np.arange(256), 16))
    low = np.full(4096, -1 if signed else 0, dtype=F)  # nothing below the end of the map; a zero block
    assert not codec.quantize_stochastic(low, signed, 256, 1, 0)[0].any()


def test_round_stochastic_to_low_precision() -> None:
    n = 2**18
    r = codec.random_unit(3, 4, n)
    for sign in (1, -1):
        up = codec.round_stochastic_to(np.full(n, sign * (1 + 2.0**-9), F), "bfloat16", 3).astype(F)
        assert np.array_equal(up, sign * np.where(r < 0.25, F(1 + 2.0**-7), F(1)))
        tiny = codec.round_stochastic_to(np.full(n, sign * 2.0**-26, F), "float16", 3).astype(F)
        assert np.array_equal(tiny, sign * np.where(r < 0.25, F(2.0**-24), F(0)))
    big = np.array([65504, 65519, 65521, 3e38, -3e38, np.inf, -np.inf, np.nan, -0.0], F)
    for step in range(20):
        out = codec.round_stochastic_to(big, "float16", step)
        assert out.dtype == np.float16
        assert out[:5].tolist() == [65504] * 4 + [-65504]
        assert out[5:7].tolist() == [np.inf, -np.inf]
        assert np.isnan(out[7])
        assert np.signbit(out[8])
        top = codec.round_stochastic_to(np.array([np.finfo(F).max] * 9, F), "bfloat16", step)
        assert np.all(np.isfinite(top.astype(F)))


# ---------------------------------------------------------------- CameAMP

PLAIN: dict[str, Any] = {"lr": 1e-3, "max_lr": 1.0, "min_lr": 1e-9, "warmup_steps": 0, "weight_decay": 0.0}
PLAIN |= STAGES_OFF
# Without the question of agreement there is no climb, and 1e-5 is where a search begins.
WALK_ALONE: dict[str, Any] = {**PLAIN, "lr": 1e-5, "agreement_floor": -1}


def test_two_steps_of_one_scalar_by_hand() -> None:
    oracle = CameampOracle([()], **{**PLAIN, "weight_decay": 0.1})
    w = [np.array(2.0)]
    # t = 1, g = 2: u = m_hat = 1, r = 0, r_hat = 0.001 / 0.002 = 0.5, b = 1.
    d = 1 / math.sqrt(0.51)
    tau1 = (1 + d / (d + 0.01)) / 2
    (update,) = oracle.step_([np.array(2.0)], w)
    assert update == pytest.approx(-1e-3 * (d * tau1 + 0.1 * 2), rel=1e-9)
    # t = 2, g = -1: v = (0.99 * 0.01 * 4 + 0.01 * 1) / (1 - 0.99^2)
    v = (0.0396 + 0.01) / 0.0199
    u = -1 / math.sqrt(v)
    m = (0.9 * 0.1 + 0.1 * u) / 0.19
    r_hat = (0.001 * (u - m) ** 2 + 0.001) / (2 - 0.999 - 0.999**2)
    d = m / math.sqrt(r_hat + 0.01)
    x = d * u
    tau2 = (1 + x / (abs(x) + 0.01)) / 2
    b = 2 / (1 + math.exp(4 * (math.sqrt(v) / 2 - 1)))  # the scale of step 1 was sqrt(4)
    (update,) = oracle.step_([np.array(-1.0)], w)
    assert update == pytest.approx(-1e-3 * (d * tau2 / tau1 + 0.1 * b * 2), rel=1e-9)
    assert oracle.state[0]["torque_mean"] == pytest.approx(tau2)
    assert oracle.state[0]["background_scale"] == pytest.approx(math.sqrt(v))


def test_factored_first_step_of_a_rank_one_gradient_is_a_sign() -> None:
    g = np.outer([1.0, -10.0], [3.0, 0.1, -2.0])
    oracle = CameampOracle([(2, 3)], factored="all", torque=False, **PLAIN)
    (update,) = oracle.step_([g], [np.zeros((2, 3))])
    np.testing.assert_allclose(update, -1e-3 * np.sign(g) / math.sqrt(1.01), rtol=1e-9)
    row, column = oracle.state[0]["exp_avg_sq"]
    assert row.shape == (2, 1)
    assert column.shape == (1, 3)
    np.testing.assert_allclose(row[:, 0], 0.01 * np.array([1, 100]) * 13.01 / 3)


def test_skipped_absent_and_empty_arrays() -> None:
    fields = {**WALK_ALONE, "warmup_steps": 4, "torque_decay": 0.5, "straightness": 1e9, "lr_mask_gain": 0.2}
    fields["factored"] = "none"
    oracle = CameampOracle([(2, 2), (2, 2), (0, 3)], **fields)
    w = [np.ones((2, 2)), np.ones((2, 2)), np.ones((0, 3))]
    good, bad, big = np.ones((2, 2)), np.array([[1.0, np.nan], [1.0, 1.0]]), np.full((2, 2), 2e15)
    for second in (bad, big, None, np.full((2, 2), 1e15)):
        updates = oracle.step_([good, second, np.ones((0, 3))], w)
    assert oracle.step == 4
    assert [s["age"] for s in oracle.state] == [4, 1, 0]
    assert [s["skipped_steps"] for s in oracle.state] == [0, 2, 0]
    # The second array's first step is now: r_hat is that of age 1.
    d = 1 / math.sqrt(0.51)
    a = 0.5 * d / (d + 0.01)
    np.testing.assert_allclose(updates[1], -1e-5 * d * (1 + a) / 2)
    # In E counts who takes part.  In the vote counts who has a last gradient.
    assert oracle.walk_energy == pytest.approx(1e-10 * (4 + 4 + 4 + 8))
    assert oracle.agreement == 1
    assert updates[2].shape == (0, 3)
    assert oracle.state[0]["s"] is not None
    oracle.step_([good, None, None], w)
    assert oracle.state[0]["s"] is None


@pytest.mark.parametrize("factored", ["none", "second_moment", "all"])
def test_layouts_are_transposes(factored: str) -> None:
    rng = np.random.default_rng(0)
    fields: dict[str, Any] = {**PLAIN, "factored": factored, "warmup_steps": 6, "search_gain": 0}
    fields |= {"weight_decay": 0.1, "torque_decay": 0.5, "lr_mask_gain": 0.2}
    torch_order = CameampOracle([(5, 9, 4, 2), (7, 3)], layout="torch", **fields)
    flax_order = CameampOracle([(4, 2, 9, 5), (7, 3)], layout="flax", embedding=[False, True], **fields)
    w = [rng.normal(size=(5, 9, 4, 2)), rng.normal(size=(7, 3))]
    for _ in range(9):
        g = [rng.normal(size=x.shape) for x in w]
        g[0][1] *= 5
        g[1][2] = 0
        one = torch_order.step_(g, w)
        two = flax_order.step_([g[0].transpose(2, 3, 1, 0), g[1]], [w[0].transpose(2, 3, 1, 0), w[1]])
        np.testing.assert_allclose(two[0], one[0].transpose(2, 3, 1, 0), rtol=1e-9)
        np.testing.assert_allclose(two[1], one[1], rtol=1e-9)
    assert torch_order.state[0]["spatial_variance"].shape == (5, 1, 1, 1)
    assert flax_order.state[0]["spatial_variance"].shape == (1, 1, 1, 5)


def test_rates_and_spatial_factor() -> None:
    def schedule(count: int) -> float:
        return [0.0, 1e-3, 5e-3, 1e-10][count]

    fields = {**PLAIN, "lr": schedule, "torque": False}
    oracle, wide = CameampOracle([(2, 68)], **{**fields, "max_lr": 2e-3}), CameampOracle([(2, 68)], **fields)
    # Varied and quiet: kappa 0.707 and 2.
    g = np.tile([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 0.99]], 17)
    w = [np.zeros((2, 68))]
    assert not wide.step_([g], w)[0].any()
    assert not oracle.step_([g], w)[0].any()  # a rate of exactly 0 stays 0
    last = oracle.state[0]["spatial_variance"].copy()
    assert last[0, 0] > last[1, 0] > 0
    for _ in range(3):
        update = oracle.step_([g], w)[0]
        scaled = np.abs(update).mean(axis=1)
        assert scaled[1] / scaled[0] == pytest.approx(2 / math.sqrt(0.5), rel=0.01)
        assert np.array_equal(update, wide.step_([g], w)[0]), "a limit touched the rate that was asked for"
    oracle.step, oracle.log_rate_scale = 1, math.log(3)  # as if the search had found a factor of 3
    found = np.abs(oracle.step_([g], w)[0]).mean(axis=1)
    assert found[1] / found[0] == pytest.approx(1, rel=0.01), "both rows at max_lr"


def test_every_switch_changes_the_updates() -> None:
    def run(disable: frozenset[str], growth: float = 1, **off: Any) -> np.ndarray:
        rng = np.random.default_rng(1)
        fields: dict[str, Any] = {"lr": 1.4e-5, "max_lr": 1.5e-5, "warmup_steps": 5, "weight_decay": 1.0}
        fields |= {"lr_mask_gain": 0.2, "straightness": 1.45, "search_gain": 0.3, "agreement_floor": -0.08}
        fields |= {"spatial_scope": "all", "percentile_clipping": 20, "lora": [True, False], **off}
        oracle = CameampOracle([(6, 70), (4,)], disable=disable, **fields)
        w = [rng.normal(size=(6, 70)), rng.normal(size=4)]
        updates = []
        for t in range(8):
            g = [growth**t * (rng.normal(size=x.shape) ** 3 + 0.5) for x in w]
            if t == 4:
                g[1][0] = np.inf
            updates += [np.concatenate([x.ravel() for x in oracle.step_(g, w)])]
        return np.array(updates)

    # A search does not ramp.  Clipped gradients do not grow, and in a climb they may.
    others: dict[str, dict[str, Any]] = {"warmup_ramp": {"search_gain": 0}, "calm": {"growth": 1.6, "max_lr": 1}}
    others["calm"] |= {"percentile_clipping": 100, "warmup_steps": 9, "straightness": 0.1, "agreement_floor": -1.0}
    usual = run(frozenset())
    for name in sorted(FEATURES | STAGES):
        fields = others.get(name, {})
        other, full = run(frozenset({name}), **fields), run(frozenset(), **fields) if fields else usual
        assert np.abs(other - full).max() > 1e-3 * np.abs(full).max(), name
