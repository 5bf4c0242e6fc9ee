"""Verdicts on synthetic losses: noise and spikes are neither a rise nor a stall, real ones are found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from automagic_core.watching.loss_trend import loss_trend
from automagic_core.watching.monitor import TrainingMonitor
from automagic_core.watching.suggestions import ISSUES, RunRates, suggestion

STEPS = 600
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


def noise(seed: int, size: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


class Monitor(TrainingMonitor):
    """Losses are floats already; skipped steps and memory use are what a test sets."""

    def __init__(self, window_size: int = 50, memory: float | None = None) -> None:
        self.skipped = 0
        self.asked = 0
        super().__init__(window_size, lambda: memory)

    def update(self, loss: float) -> None:
        self._record(loss)

    def _to_floats(self, losses: list[Any]) -> list[float]:
        self.asked += 1
        return [float(loss) for loss in losses]

    def _skipped_now(self) -> int:
        return self.skipped

    def _count(self, skipped: int) -> int:
        return skipped

    def _rates(self) -> RunRates | None:
        return None


def verdicts(losses: np.ndarray, window_size: int = 50, every: int = 1) -> list[str | None]:
    """What a monitor says after every update, or after some."""
    monitor = Monitor(window_size)
    said: list[str | None] = []
    for t, loss in enumerate(losses):
        monitor.update(loss)
        if t % every:
            continue
        wrong, issue = monitor.should_adjust_config()
        assert wrong is (issue is not None)
        said.append(issue)
    return said


def share(said: list[str | None], issue: str | None) -> float:
    return sum(s == issue for s in said) / len(said)


T = np.arange(STEPS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "losses",
    [
        # Falls by 5 % within a window at first, by 3 % at the end, under 2 % of noise.
        lambda seed: 5 * (1 + T) ** -0.3 * (1 + 0.02 * noise(seed)),
        lambda seed: np.exp(-T / 200) + 0.02 * noise(seed) * np.exp(-T / 200),
        # A tenth of the batches is ten times as hard.
        lambda seed: np.exp(-T / 200) * np.where(noise(seed + 50) > 1.3, 10.0, 1.0),
        # A negative loss that goes on falling (a log-likelihood).
        lambda seed: -np.log1p(T) + 0.05 * noise(seed),
    ],
    ids=["power law", "exponential", "spikes", "negative"],
)
def test_fine_runs_raise_no_alarm(losses: Any, seed: int) -> None:
    said = verdicts(losses(seed), every=3)
    assert "divergence" not in said
    # Two standard errors leave 2 % of wrong verdicts, and those of neighbouring steps come together.
    assert share(said, None) > 0.94


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_as_large_as_the_loss_hides_what_happens(seed: int) -> None:
    said = verdicts(np.abs(1 + noise(seed)), every=3)
    assert "divergence" not in said
    assert share(said, None) > 0.8, "without a verdict more often than not"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", [0.0, 0.01, 0.05])
def test_a_flat_loss_is_a_stall(seed: int, level: float) -> None:
    said = verdicts(2 + 2 * level * noise(seed))
    assert said[:49] == [None] * 49, "before the window is full a stall cannot be told"
    assert "divergence" not in said
    # Where chance tilts the window by two standard errors, or a longer span, the verdict is withheld.
    assert share(said[49:], "convergence_stall") > 0.75


def test_a_run_that_fell_and_then_stands_still_stalls_within_two_windows() -> None:
    losses = np.where(T < 300, 3 - T / 150, 1.0) * (1 + 0.02 * noise(4))
    said = verdicts(losses)
    assert share(said[:300], None) > 0.98
    assert "convergence_stall" in said[300:400]
    assert share(said[400:], "convergence_stall") > 0.6


def test_progress_too_slow_for_one_window_is_seen_over_several() -> None:
    # Half a percent in 50 steps under 1 % of noise: one window sees half of that between its halves, ± 0.35 %.
    losses = (1 - 1e-4 * T) * (1 + 0.01 * noise(5))
    said = verdicts(losses)
    assert share(said[400:], None) > 0.9
    flat = verdicts(losses + 1e-4 * T)
    assert share(flat[400:], "convergence_stall") > 0.8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "rise",
    [
        lambda t: 1 + t / 50,
        lambda t: 1.05**t,
        lambda t: np.minimum(1.5**t, 1e30),
        lambda t: np.where(t > 0, 1.5, 1.0),
    ],
    ids=["linear", "exponential", "explosion", "jump"],
)
def test_a_rise_is_divergence(rise: Any, seed: int) -> None:
    after = np.maximum(T[:160] - 100, 0).astype(float)
    said = verdicts(rise(after) * (1 + 0.05 * noise(seed, 160)))
    assert "divergence" not in said[:100]
    # Three quarters of the window's second half, then of the span's of two windows, have to lie after the jump.
    assert "divergence" in said[100:130]
    assert set(said[140:]) == {"divergence"}


def test_small_windows_are_not_fooled_more_often() -> None:
    # 10 losses with 5 % of noise: at most one alarm in a hundred.
    said = verdicts(1 + 0.05 * noise(6, 2000), window_size=10, every=3)
    assert share(said, "divergence") < 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_divergence_while_it_is_in_the_window(bad: float) -> None:
    losses = np.exp(-T[:120] / 40)
    losses[60] = bad
    said = verdicts(losses, window_size=20)
    assert [i for i, issue in enumerate(said) if issue == "divergence"] == list(range(60, 80))


def test_skipped_steps_count_while_in_the_window_only() -> None:
    monitor = Monitor(window_size=20)
    found = []
    for t in range(120):
        monitor.skipped += t in (30, 31)
        monitor.update(np.exp(-t / 40))
        found.append(monitor.should_adjust_config()[1] == "skipped_steps")
    first, last = found.index(True), len(found) - 1 - found[::-1].index(True)
    # Noted in steps of a tenth of the window, which is 2 here.
    assert first == 30
    assert 31 + 20 - 2 <= last <= 31 + 20 + 2
    monitor.skipped += 1
    monitor.reset()
    assert monitor.should_adjust_config() == (False, None)


def test_memory_pressure_and_the_order_of_issues() -> None:
    for used, expected in ((None, None), (0.9, None), (0.91, "memory_pressure")):
        monitor = Monitor(window_size=10, memory=used)
        for t in range(10):
            monitor.update(np.exp(-t))
        assert monitor.should_adjust_config()[1] == expected
    monitor.skipped = 1
    assert monitor.should_adjust_config()[1] == "memory_pressure"
    monitor.update(np.nan)
    assert monitor.should_adjust_config()[1] == "divergence"


def test_losses_stay_where_they_are_until_asked_for_and_memory_is_bounded() -> None:
    monitor = Monitor(window_size=10)
    for t in range(1000):
        monitor.update(float(t))
    assert monitor.asked == 0
    assert len(monitor._pending) == 80
    monitor.should_adjust_config()
    monitor.should_adjust_config()
    assert monitor.asked == 1
    assert list(monitor._losses) == list(range(920, 1000))
    assert len(monitor._counts) <= 12


@pytest.mark.parametrize("window_size", [9, 0, 12.5, True, "50"])
def test_a_wrong_window_size_is_named(window_size: Any) -> None:
    with pytest.raises(ValueError, match=r"window_size = .* is not valid; valid: an integer ≥ 10"):
        Monitor(window_size)


def test_a_trend_needs_ten_finite_losses() -> None:
    assert loss_trend(np.ones(9)) is None
    assert loss_trend([1.0] * 9 + [np.nan]) is None
    assert loss_trend(np.ones(10)) is not None
    odd = loss_trend([*range(11), 100])
    assert odd is not None
    assert (odd.before, odd.after) == (2.5, 8.5)


SEARCHING = RunRates(lr=1e-5, rate=2e-4, min_lr=1e-7, max_lr=1e-2, searching=True)


@pytest.mark.parametrize(
    ("issue", "rates", "fields"),
    [
        ("divergence", SEARCHING, {"max_lr": 6.7e-5, "lr": 1e-5}),
        ("divergence", SEARCHING._replace(lr=2e-4, min_lr=1e-4), {"max_lr": 6.7e-5, "lr": 6.7e-5, "min_lr": 6.7e-5}),
        ("divergence", SEARCHING._replace(lr=None), {"max_lr": 6.7e-5}),
        ("divergence", None, {}),
        ("convergence_stall", SEARCHING, {}),
        ("convergence_stall", SEARCHING._replace(rate=1e-2), {"max_lr": 3e-2}),
        ("convergence_stall", SEARCHING._replace(searching=False), {"lr": 3e-5, "max_lr": 1e-2}),
        # The search ended far below lr, which the new lr must not lift above max_lr.
        ("convergence_stall", RunRates(8e-3, 5e-5, 1e-7, 1e-2, False), {"lr": 2.4e-2, "max_lr": 2.4e-2}),
        ("convergence_stall", SEARCHING._replace(searching=False, rate=1e-2), {"lr": 3e-5, "max_lr": 3e-2}),
        ("convergence_stall", SEARCHING._replace(searching=False, lr=None), {"max_lr": 1e-2}),
        ("convergence_stall", None, {}),
        ("skipped_steps", SEARCHING, {}),
    ],
)
def test_suggestions(issue: str, rates: RunRates | None, fields: dict[str, float]) -> None:
    suggested = suggestion(issue, rates)
    assert suggested.pop("text")
    assert suggested == pytest.approx(fields)


def test_every_suggestion_makes_a_valid_configuration() -> None:
    from automagic_core import Config

    config = Config(lr=1e-5, max_lr=1e-2, optim_bits=32)
    for issue in ISSUES:
        for searching in (True, False):
            for rate in (1e-5, 2e-4, 1e-2):
                fields = suggestion(issue, SEARCHING._replace(searching=searching, rate=rate))
                fields.pop("text")
                changed = Config(**{**config.__dict__, **fields})
                if issue == "memory_pressure":
                    assert (changed.factored, changed.optim_bits, changed.min_8bit_size) == ("all", 8, 1024)
    with pytest.raises(ValueError, match="issue = 'boredom' is not one of divergence"):
        suggestion("boredom")
