"""The oracle's rate search against numbers worked out by hand from section 5.8 of ALGORITHM.md."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.oracle.cameamp import CameampOracle
from tests.oracle.rate_search import rise_after_climb
from tests.oracle.test_oracle_itself import PLAIN, WALK_ALONE, mix32_by_hand


def test_a_search_by_the_walk_alone_by_hand() -> None:
    fields = {**WALK_ALONE, "warmup_steps": 8, "torque": False, "straightness": 2.0, "search_gain": 0.1}
    oracle, w = CameampOracle([(1,)], **fields), [np.zeros(1)]
    # A constant gradient: u = m_hat = 1 and e = 0, so d is 1 / sqrt(0.001 / (2 - 0.999 - 0.999^t) + 0.01).
    d = [1 / math.sqrt(0.001 / (1.001 - 0.999**t) + 0.01) for t in (1, 2, 3)]
    # t = 1: rho = 1.40, not straight enough.
    (update,) = oracle.step_([np.array([2.0])], w)
    assert update[0] == pytest.approx(-1e-5 * d[0])
    assert (oracle.log_rate_scale, oracle.walk_energy) == (0, pytest.approx(1e-10))
    assert abs(oracle.state[0]["walk"][0]) == pytest.approx(1e-5 * d[0])
    oracle.step_([np.array([2.0])], w)
    rho = (d[0] + d[1]) / math.sqrt(2)
    assert oracle.log_rate_scale == pytest.approx(0.1 * math.log(rho / 2))
    # t = 3: the rate that was found is in the step, in the walk and in its energy.
    factor = math.exp(oracle.log_rate_scale)
    (update,) = oracle.step_([np.array([2.0])], w)
    assert update[0] == pytest.approx(-1e-5 * factor * d[2])
    rho = (d[0] + d[1] + factor * d[2]) / math.sqrt(2 + factor**2)
    assert oracle.log_rate_scale == pytest.approx(math.log(factor) + 0.1 * math.log(rho / 2))
    assert (oracle.agreement, oracle.peak_agreement) == (0, 0)


def test_the_climb_and_its_end_by_hand() -> None:
    def lr(count: int) -> float:
        return 1e-7 if count == 9 else 1e-3

    fields = {**PLAIN, "lr": lr, "warmup_steps": 20, "straightness": 1e-3, "search_gain": 0.1}
    oracle, w = CameampOracle([(1,), (1,)], **fields), [np.zeros(1)] * 2
    rows = []
    # The first gradient keeps its sign.  The second turns at t = 6, and its momentum at t = 9.
    signs = (1, 1, 1, 1, 1, -1, -1, -1, -1)
    for second in signs:
        updates = oracle.step_([np.array([2.0]), np.array([2.0 * second])], w)
        rows.append((oracle.log_rate_scale + math.log(100), oracle.agreement, oracle.peak_agreement))
        rows[-1] += (oracle.walk_energy, updates)
    # From 1e-5, by 0.4 in each step, by nothing at t = 6, where A is half of its peak, and at t = 7 back by 0.8.
    found, agreement, peak, energy, updates = zip(*rows, strict=True)
    # After the climb log(rho / s) counts as 0.5 at most.
    assert found == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 1.2, 1.25, 1.3])
    assert agreement == (0, 1, 1, 1, 1, 0.5, 0.25, 0.125, 0.0625)
    assert peak == (0, 0, 0, 0, 1, 1, -1, -1, -1)
    # In the climb E and the walk are those of the step alone.  The first step after it keeps those of the last in it.
    of_step = [2 * (1e-5 * math.exp(ell)) ** 2 for ell in (0, *found)]
    assert energy[:7] == pytest.approx(of_step[:7])
    assert energy[7:] == pytest.approx([sum(of_step[6:8]), sum(of_step[6:9])])
    for i in range(2):
        assert abs(oracle.state[i]["walk"][0]) == pytest.approx(abs(sum(update[i][0] for update in updates[6:])))
    # A step of a ten-thousandth of the rate is no evidence, however straight the path.  Then both agree: the climb goes
    # on with what was taken back, and a little of a step.
    for second, rise in ((1, 0), (-1, 0.05), (-1, 0.8 + 0.4 * (2 * 0.5078125 - 1))):
        before = oracle.log_rate_scale
        oracle.step_([np.array([2.0]), np.array([2.0 * second])], w)
        assert oracle.log_rate_scale == pytest.approx(before + rise)
    assert (oracle.agreement, oracle.peak_agreement) == (0.5078125, 1)


@pytest.mark.parametrize(
    ("rho", "growth", "agreement", "peak", "rise"),
    [
        (3.0, 1.0, 0.3, 0.7, 0.15),  # the largest rise of all
        (1.3, 1.0, 0.3, 0.7, 0.5 * math.log(1.3 / 1.2)),
        (1.3, 1.5, 0.3, 0.7, 0.25 * math.log(1.3 / 1.2)),
        (1.3, 2.1, 0.3, 0.7, 0),  # gradients have grown
        (1.3, 1.0, -0.06, 0.7, 0.75 * 0.04),
        (1.3, 1.0, -0.06, 0.08, 0),  # -0.04 is the least, half of the peak
        (1.2, 1.0, 0.3, 0.7, 0),  # not straight enough, and gradients have not shrunk
        (1.0, 0.8, 0.3, 0.7, 0.5 * math.log(1.0 / 0.96)),
        (0.7, 0.4, 0.3, 0.7, 0.5 * math.log(0.7 / 0.6)),  # down to half of the straightness
        (0.59, 0.1, 0.3, 0.7, 0),
        (1.1, 0.6, -0.03, 0.7, 0.75 * 0.04),  # -0.03 counts twice
        (1.1, 0.6, -0.03, 0.08, 0),
        (1.1, 0.6, 0.03, 0.7, 0.75 * 0.13),  # and 0.03 once
        (1.3, 0.6, -0.03, 0.7, 0.75 * 0.07),
        (1.1, 0.6, None, 0.7, 0.5 * math.log(1.1 / 0.72)),
    ],
)
def test_the_rise_after_the_climb_by_hand(
    rho: float, growth: float, agreement: float | None, peak: float, rise: float
) -> None:
    cfg = SimpleNamespace(straightness=1.2, search_gain=0.5, agreement_floor=-0.1)
    for sign in (1, -1):
        assert rise_after_climb(cfg, rho, growth, agreement, sign * peak) == pytest.approx(rise)


@pytest.mark.parametrize(("lr", "ell"), [(0.0, 0), (1e-6, 0), (1e-5, 0), (0.1, -math.log(1e4))])
def test_a_search_begins_at_the_lower_of_1e_5_and_the_rate_given(lr: float, ell: float) -> None:
    oracle = CameampOracle([(1,)], **{**PLAIN, "lr": lr, "warmup_steps": 8})
    oracle.step_([np.zeros(1)], [np.zeros(1)])
    assert oracle.log_rate_scale == pytest.approx(ell)


def test_walk_and_votes_by_hand() -> None:
    fields = {**WALK_ALONE, "warmup_steps": 10, "lr_mask_gain": 0.2, "straightness": 1e9}
    oracle = CameampOracle([(2, 2), (3,)], layout="torch", **fields)
    w = [np.zeros((2, 2)), np.zeros(3)]
    first = [np.array([[1.0, 1.0], [0.0, -1.0]]), np.array([1.0, 1.0, 1.0])]
    walk: list[Any] = [0, 0]
    updates = oracle.step_(first, w)
    for i, sign in enumerate((_signs_by_hand(4).reshape(2, 2), _signs_by_hand(3))):
        walk[i] = walk[i] - (sign * updates[i]).sum(axis=-1, keepdims=True)
    assert (oracle.agreement, oracle.walk_energy) == (0, pytest.approx(7e-10))
    assert not oracle.state[0]["lr_mask"].any()
    # Rows (3 - 1) / 4 and -1 (its zero votes nothing); array 1 / 8 * (3 - 1 - 4) = -1/4; the other +1.
    second = [np.array([[3.0, -1.0], [-0.0, 4.0]]), np.array([2.0, 0.0, 0.0])]
    updates = oracle.step_(second, w)
    a_hat = (4 * -0.25 + 3 * 1) / 7
    assert oracle.agreement == pytest.approx(a_hat)  # the first vote enters whole
    delta = 0.2 * (np.array([0.5, -1.0]) - a_hat) * 2 / 258
    np.testing.assert_allclose(oracle.state[0]["lr_mask"][:, 0], delta)
    assert oracle.state[1]["lr_mask"] is None
    for i, sign in enumerate((_signs_by_hand(4).reshape(2, 2), _signs_by_hand(3))):
        np.testing.assert_allclose(oracle.state[i]["walk"], walk[i] - (sign * updates[i]).sum(axis=-1, keepdims=True))
    array_rate, row_rate = oracle._rates(oracle.state[0], 1e-5, 1.0)
    assert array_rate == 1e-5
    np.testing.assert_allclose(row_rate[:, 0], array_rate * np.exp(delta))
    # An array without a gradient does not count in E, and no vote of it in A.
    oracle.step_([0 * first[0], -second[1]], w)
    assert oracle.agreement == pytest.approx((a_hat - 1) / 2)
    assert oracle.walk_energy == pytest.approx((7 + 7 + 3) * 1e-10)
    for _ in range(8):
        oracle.step_(first, w)
    assert oracle.state[0]["walk"] is None
    assert oracle.log_rate_scale == 0


def _signs_by_hand(numel: int) -> np.ndarray:
    key = mix32_by_hand((5 * 0x85EBCA6B + numel) % 2**32)
    return np.array([-1.0 if mix32_by_hand((i + key) % 2**32) >= 2**31 else 1.0 for i in range(numel)])


def test_what_moves_the_rate() -> None:
    def found(gradient: Any, steps: int = 40, **fields: Any) -> float:
        oracle = CameampOracle([(60, 5), (9,)], **{**PLAIN, "lr": 1e-5, "warmup_steps": 100, **fields})
        w = [np.zeros((60, 5)), np.zeros(9)]
        for t in range(steps):
            oracle.step_(gradient(t), w)
        return oracle.log_rate_scale

    rng = np.random.default_rng(0)
    steady = [rng.normal(size=(60, 5)), rng.normal(size=9)]
    assert found(lambda t: steady) == pytest.approx(math.log(1e5))  # all the room below max_lr
    assert found(lambda t: steady, max_lr=1e-5) == 0
    # Noise: the climb ends as soon as it may, and the path is hardly ever a straight one.  A straight path would add 9.
    noise = [[rng.normal(size=x.shape) for x in steady] for _ in range(80)]
    assert 0.8 <= found(lambda t: noise[t], 30) <= found(lambda t: noise[t], 80) < 3
    # Two of three rows are long and oppose their momentum.  The path is straight, so the walk alone would rise.
    long = [np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) % 3 < 2 for x in steady]
    drift = lambda t: [np.where(rows, 3 * (-1) ** t * x, x) for x, rows in zip(steady, long, strict=True)]  # noqa: E731
    assert found(drift, 4) == pytest.approx(1.6)
    assert found(drift) == pytest.approx(1.6, abs=0.01)
    assert found(drift, agreement_floor=-1) > 3
