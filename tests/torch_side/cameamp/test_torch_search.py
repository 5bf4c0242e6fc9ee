"""Section 5.8 in PyTorch: what moves the rate, what never lowers it, what counts, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from automagic_core import Config, Slot, rounding_key, walk_signs
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.cameamp.learning_rate import Evidence, Rates, Search, searched
from automagic_torch.codec.random_bits import signs
from tests.oracle.rate_search import random_rises, rise_after_climb
from tests.torch_side.torch_helpers import parameters, same, snapshot, through_a_file

SHAPES = ((60, 5), (9,))
# 1e-5 is where a search begins, so ℓ begins at 0.
FIELDS: dict[str, Any] = {"lr": 1e-5, "max_lr": 1.0, "warmup_steps": 100, "weight_decay": 0.0, "optim_bits": 32}


def gradient(p: torch.Tensor, seed: int, t: int, turning: bool) -> torch.Tensor:
    """The same in every step; `turning`: but for long rows, two of three, whose sign alternates.

    These oppose the momentum, and the others make the path a straight one all the same.
    """
    g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    if turning:
        g[torch.arange(len(g)) % 3 < 2] *= 3 * (-1) ** t
    return g


def taken(optimizer: AutomagicCameAMP8bit, steps: range, turning: Callable[[int], bool] = lambda t: False) -> float:
    """ℓ of the first group after steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for index, p in enumerate(params):
            p.grad = gradient(p, index, t, turning(t))
        optimizer.step()
    return float(optimizer.param_groups[0]["automagic_log_rate_scale"])


def always(t: int) -> bool:
    return True


def made(**fields: Any) -> AutomagicCameAMP8bit:
    return AutomagicCameAMP8bit(parameters(SHAPES), **FIELDS | fields)


@pytest.mark.parametrize(("numel", "first"), [(1, 0), (1000, 0), (1000, 377), (2**33 + 5, 2**32 - 3)])
def test_the_signs_of_a_piece_are_the_cores(numel: int, first: int) -> None:
    count = min(numel - first, 100_000)
    key = (rounding_key(0, Slot.walk, numel) + first) % 2**32
    expected = walk_signs(numel, np.arange(first, first + count, dtype=np.uint64))
    assert signs(key, count, torch.device("cpu")).tolist() == expected.tolist()


def test_the_walk_is_the_distance_that_the_weights_have_travelled() -> None:
    (p,) = parameters([(2000, 8)])
    start = p.detach().clone()
    optimizer = AutomagicCameAMP8bit([p], **FIELDS, agreement_floor=-1)
    for t in range(30):
        p.grad = 0.3 + torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    distance = float((p.detach() - start).square().sum())
    # A sum of 2,000 squares: 4 of its standard errors, where the rows are normal.
    assert float(optimizer.state[p]["walk"].square().sum()) == pytest.approx(distance, rel=4 * math.sqrt(2 / 2000))


def test_a_straight_path_raises_the_rate_and_a_random_walk_does_not() -> None:
    assert taken(made(), range(40)) == pytest.approx(math.log(1e5))  # all the room that `max_lr` leaves
    noisy = made()
    found = []
    for t in range(60):
        for index, p in enumerate(noisy.param_groups[0]["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2 * t + index))
        noisy.step()
        found.append(float(noisy.param_groups[0]["automagic_log_rate_scale"]))
    # The votes of noise are about 0, and end the climb as soon as one is low.  They were never high, so little is taken
    # back.  Then the path is hardly a straight one.
    assert found[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    ended = next(t for t in range(4, 60) if found[t] <= found[t - 1])
    assert ended < 15
    assert found[ended - 1] - 0.8 < found[ended]
    assert found[-1] < 3


def test_gradients_that_alternate_stop_a_search_that_the_walk_alone_would_go_on_with() -> None:
    # The climb asks from step 5 on.  Where no vote was high, it hardly goes back.
    assert taken(made(), range(4), always) == pytest.approx(4 * 0.4)
    assert taken(made(), range(40), always) == pytest.approx(4 * 0.4, abs=0.01)
    assert taken(made(agreement_floor=-1), range(40), always) > 3
    # What was found before stays, but for two steps, which come back where gradients agree again.
    optimizer = made()
    assert taken(optimizer, range(15)) == pytest.approx(15 * 0.4)
    assert 13 * 0.4 <= taken(optimizer, range(15, 30), always) < 14 * 0.4
    while float(optimizer.param_groups[0]["automagic_agreement"]) < 0.5:
        found = taken(optimizer, range(30, 31))
    assert 15 * 0.4 < found < 16 * 0.4


def test_the_climb_ends_where_half_of_the_agreement_is_gone() -> None:
    """Three in four gradients keep their signs, so the path stays straight and the agreement above its floor."""
    (p,) = parameters([(64, 64)])
    optimizer = AutomagicCameAMP8bit([p], **FIELDS)
    (group,) = optimizer.param_groups
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    turning = torch.arange(64) % 8 < 3
    seen = []
    for t in range(60):
        p.grad = torch.where(turning & (t >= 10) & (t % 2 == 1), -direction, direction)
        before = float(group["automagic_peak_agreement"])
        optimizer.step()
        seen.append((float(group["automagic_agreement"]), before, float(group["automagic_peak_agreement"])))
    ended = next(t for t, (_, _, after) in enumerate(seen) if after < 0)
    agreement, peak, _ = seen[ended]
    assert 10 < ended < 59
    assert group["automagic_agreement_floor"] < agreement < peak / 2
    assert all(a >= before / 2 for a, before, _ in seen[5:ended])


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_hardly_raises_the_rate(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = parameters([(64, 64)] * 4)
    optimizer = AutomagicCameAMP8bit(params, **FIELDS)
    for _ in range(100):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    # The first five steps take it to 5e-5 whatever votes say.  With a bound of −0.1 it went on to 1.3e-4 to 1.5e-4.
    assert 4e-5 < optimizer.get_learning_rates()[0] < 8e-5


@pytest.mark.parametrize(
    ("length", "floor"), [(1.0, -0.1), (1.0, 0.1), (1.0, 0.4), (0.25, -0.1), (1.6, -0.1), (2.5, -0.1)]
)
def test_agreement_and_the_length_of_gradients_bound_the_rise(length: float, floor: float) -> None:
    """Five of eight rows keep their signs after the climb, so A is 0.25 and the path is straight."""
    (p,) = parameters([(64, 64)])
    optimizer = AutomagicCameAMP8bit([p], **FIELDS | {"max_lr": 1e6, "straightness": 0.1, "agreement_floor": floor})
    (group,) = optimizer.param_groups
    direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    turning = torch.arange(64) % 8 < 3
    rises = []
    for t in range(70):
        p.grad = torch.where(turning & (t >= 10) & (t % 2 == 1), -direction, direction) * (length if t >= 25 else 1.0)
        before = float(group["automagic_log_rate_scale"])
        optimizer.step()
        rises.append(float(group["automagic_log_rate_scale"]) - before)
    agreement = float(group["automagic_agreement"])
    assert 0.1 < agreement < 0.3
    of_walk = 0.5 * 0.5 * min(1.0, max(0.0, 2 - length))
    assert rises[-1] == pytest.approx(min(of_walk, max(0.0, 0.75 * (agreement - floor)), 0.15), rel=1e-3, abs=1e-7)


def test_the_rise_after_the_climb_is_the_oracles() -> None:
    config, number = Config(max_lr=1e6), torch.tensor
    rates = Rates(eta=number(1e-3), ell=number(0.0), array=number(1e-3), min_lr=config.min_lr, max_lr=config.max_lr)
    for rho, growth, agreement, peak in random_rises():
        # Two steps of 100 elements, whose gradients are as long as G.
        before = Search(*map(number, (0.0, 1e-4, agreement, peak, 1.0, growth)))
        found = Evidence(number([rho**2 * 2e-4]), number([100.0]), number([growth**2]))
        after = searched(before, [found], rates, 50, config)
        assert float(after.gradient_norm) == pytest.approx(growth)
        expected = rise_after_climb(config, rho, growth, agreement, peak)
        # A handful of float32 roundings of logarithms that are below 1.
        assert float(after.log_rate_scale) == pytest.approx(expected, abs=1e-6)


def test_limits_change_nothing_that_was_found_and_no_rate_that_is_scheduled() -> None:
    optimizer = made(lr=1e-3, max_lr=1e-2)
    (group,) = optimizer.param_groups
    found = taken(optimizer, range(40))
    assert found == pytest.approx(math.log(10))  # all the room that `max_lr` leaves
    # 5e-3 leaves room for log 2 only, and 2 for nothing.
    for step, lr in enumerate((5e-3, 2.0), start=40):
        group["lr"] = lr
        assert taken(optimizer, range(step, step + 1)) == found
        assert optimizer.get_learning_rates() == [pytest.approx(min(10 * lr, max(1e-2, lr)))]
    group["automagic_max_lr"], group["lr"] = 1e-3, 1e-3
    assert taken(optimizer, range(43, 45)) == found
    assert optimizer.get_learning_rates() == [pytest.approx(1e-3)]
    # Below `min_lr` too.  There is room for more again; what a step finds enters the next one.
    for lr in (1e-9, 0.0):
        group["lr"] = lr
        rate = lr * math.exp(found)
        found = taken(optimizer, range(45, 46))
        assert optimizer.get_learning_rates() == [pytest.approx(rate)]


@pytest.mark.parametrize("mask", [0.0, 0.2])
def test_what_is_off_has_no_state_and_what_is_on_costs_a_number_for_each_row(mask: float) -> None:
    held, names = {}, {}
    for name, fields in {"on": {}, "walk alone": {"agreement_floor": -1}, "off": {"search_gain": 0}}.items():
        optimizer = made(**fields, lr_mask_gain=mask)
        taken(optimizer, range(2))
        held[name] = optimizer.get_memory_efficiency_report()["state_bytes"]
        names[name] = {key for state in optimizer.state.values() for key in state}
        taken(optimizer, range(2, 100))
        names[name + ", later"] = {key for state in optimizer.state.values() for key in state}
    assert names["on"] - names["off"] == names["walk alone"] - names["off"] == {"walk"}
    assert names["off"] & {"walk", "lr_mask"} == ({"lr_mask"} if mask else set())
    assert "walk" not in names["on, later"] | names["walk alone, later"]
    # Votes need no state: one float32 for each row.
    assert held["on"] - held["off"] == held["walk alone"] - held["off"] == 4 * (60 + 1)


def test_what_is_absent_or_skipped_keeps_its_walk_and_counts_with_it() -> None:
    always, expert, bad = params = parameters(((8, 6), (7, 5), (4,)))
    optimizer = AutomagicCameAMP8bit(params, **FIELDS | {"max_lr": 1e6}, agreement_floor=-1, straightness=16)
    (group,) = optimizer.param_groups
    taken(optimizer, range(30))
    for step in ("expert absent", "bad skipped", "expert without a gradient", "all absent"):
        before = {p: optimizer.state[p]["walk"].clone() for p in params}
        ell, energy = (group["automagic_" + name].double().item() for name in ("log_rate_scale", "walk_energy"))
        for p in params:
            p.grad = torch.ones_like(p)
        moved = {always, expert, bad}
        if step == "expert absent":
            expert.grad, moved = None, {always, bad}
        elif step == "bad skipped":
            bad.grad[1], moved = torch.nan, {always, expert}
        elif step == "expert without a gradient":
            expert.grad.zero_()
            moved = {always, bad}
        else:
            optimizer.zero_grad()
            moved = set()
        optimizer.step()
        rate = optimizer.get_learning_rates()[0] if moved else 0.0
        energy += rate**2 * sum(p.numel() for p in moved)
        assert float(group["automagic_walk_energy"]) == pytest.approx(energy, rel=1e-6)
        for p in params:
            # An array with a gradient of zeros goes on by its momentum.
            stays = p not in moved and not (p is expert and step == "expert without a gradient")
            assert same(optimizer.state[p]["walk"], before[p]) == stays, step
        walked = sum(float(optimizer.state[p]["walk"].double().square().sum()) for p in params)
        growth = float(group["automagic_gradient_norm"] / group["automagic_first_norm"])
        rise = 0.5 * math.log(math.sqrt(walked / energy) / (16 * min(growth, 1.0))) if moved else 0.0
        assert 0.01 < rise < 0.5 * 0.5 or not moved
        assert float(group["automagic_log_rate_scale"]) == pytest.approx(ell + rise, abs=1e-6), step


def test_every_group_searches_by_itself() -> None:
    steady, alternating = parameters([(60, 5), (60, 5)])
    optimizer = AutomagicCameAMP8bit([{"params": [steady]}, {"params": [alternating], "lr": 4e-3}], **FIELDS)
    alone = AutomagicCameAMP8bit(parameters([(60, 5)]), **FIELDS)
    for t in range(30):
        steady.grad, alternating.grad = (gradient(p, 0, t, p is alternating) for p in (steady, alternating))
        optimizer.step()
    found = [float(group["automagic_log_rate_scale"]) for group in optimizer.param_groups]
    assert found == [taken(alone, range(30)), pytest.approx(math.log(1e-5 / 4e-3) + 1.6, abs=0.01)]
    assert found[0] > 10


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_a_start_that_is_far_too_high_is_the_run_from_1e_5(lr: float) -> None:
    low, high = (made(lr=start, weight_decay=0.1) for start in (1e-5, lr))
    rates: list[float] = []
    # 12 steps of the climb, then the votes fall and rise again.
    for steps, turning in ((range(12), False), (range(12, 34), True), (range(34, 40), False)):
        for t in steps:
            ells = [taken(x, range(t, t + 1), lambda t, turning=turning: turning) for x in (low, high)]
            rates += low.get_learning_rates()
            # float32: ℓ has an error of |ℓ| · 2⁻²⁴ from log and exp, and one for each rise.
            assert high.get_learning_rates() == pytest.approx(rates[-1:], rel=2e-5)
            assert ells[1] - ells[0] == pytest.approx(math.log(1e-5 / lr), abs=2e-5)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[20] < max(rates[:20]) < rates[-1] < 0.5
    for p, q in zip(*(x.param_groups[0]["params"] for x in (low, high)), strict=True):
        assert same(low.state[p]["exp_avg"], high.state[q]["exp_avg"])
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"])
def test_short_steps_of_a_schedule_raise_no_rate(schedule: str) -> None:
    optimizer = made(agreement_floor=-1, max_lr=1e6, min_lr=1e-12)
    scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, 15)
    taken(optimizer, range(2))
    found, squares, was_short = [taken(optimizer, range(2, 3))], [], []
    energy = float(optimizer.param_groups[0]["automagic_walk_energy"]) / 309
    for t in range(3, 50):
        scheduler.step()
        found.append(taken(optimizer, range(t, t + 1)))
        squares.append(optimizer.get_learning_rates()[0] ** 2)
        # The path is straight all the time.
        was_short.append(squares[-1] < (energy + sum(squares)) / (t + 1) / 4)
    assert [a == b for a, b in itertools.pairwise(found)] == was_short
    # Short ones come, and long ones after them.
    assert [short for short, _ in itertools.groupby(was_short)][:3] == [False, True, False]


@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize("schedule", ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"])
def test_a_search_does_not_make_up_for_a_falling_schedule(schedule: str, noise: float) -> None:
    """A noisy valley, a hundred times as steep along the last row as along the first; five restarts in the warm-up."""
    steepness = torch.logspace(-2, 0, 64)[:, None]
    found: list[float] = []
    for period in (None, 48):
        torch.manual_seed(0)
        w, lowest = torch.nn.Parameter(0.1 * torch.randn(64, 64)), 0.3 * torch.randn(64, 64)
        optimizer = AutomagicCameAMP8bit([w], **FIELDS | {"lr": 1e-3, "warmup_steps": 240})
        scheduler = period and getattr(torch.optim.lr_scheduler, schedule)(optimizer, period)
        for _ in range(240):
            w.grad = steepness * (w.detach() - lowest) + noise * torch.randn(64, 64)
            optimizer.step()
            if scheduler:
                scheduler.step()
        found.append(float(optimizer.param_groups[0]["automagic_log_rate_scale"]))
    # Twice for the schedule, whose mean is a half, and twice for chance.
    assert found[0] > math.log(10)
    assert found[1] == pytest.approx(found[0], abs=math.log(4))


def test_at_the_foot_of_a_schedule_no_climb_goes_on() -> None:
    optimizer = made()
    (group,) = optimizer.param_groups
    taken(optimizer, range(15))
    found = taken(optimizer, range(15, 30), always)
    group["lr"] = 1e-7
    assert taken(optimizer, range(30, 40)) == found
    assert float(group["automagic_agreement"]) > 0.9 > 0 > float(group["automagic_peak_agreement"])


def test_a_state_saved_in_the_climb_goes_on_bit_for_bit() -> None:
    def go_on(optimizer: AutomagicCameAMP8bit) -> Any:
        taken(optimizer, range(7, 10))
        climbing = float(optimizer.param_groups[0]["automagic_peak_agreement"])
        taken(optimizer, range(10, 20), always)
        return climbing, float(optimizer.param_groups[0]["automagic_peak_agreement"]), snapshot(optimizer)

    optimizer, restored = made(lr=1e-3), made(lr=1e-2)
    taken(optimizer, range(7))
    restored.load_state_dict(through_a_file(optimizer.state_dict()))
    with torch.no_grad():
        for group, other in zip(optimizer.param_groups, restored.param_groups, strict=True):
            torch._foreach_copy_(other["params"], group["params"])
    one, two = go_on(optimizer), go_on(restored)
    assert same(one, two)
    assert one[:2] == (1, -1)


def test_a_rate_of_0_is_no_evidence_and_a_schedule_may_begin_there() -> None:
    resting = made()
    (group,) = resting.param_groups
    group["lr"] = 0.0
    assert taken(resting, range(8)) == group["automagic_peak_agreement"] == group["automagic_walk_energy"] == 0
    group["lr"] = 1e-5
    assert taken(resting, range(8, 12)) == pytest.approx(4 * 0.4)
    scheduled = made(lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda t: t / 10)
    for t in range(20):
        ell = taken(scheduled, range(t, t + 1))
        scheduler.step()
        assert math.isfinite(ell)
        assert all(x.isfinite().all() for state in scheduled.state.values() for x in state.values())
    assert 0 < scheduled.get_learning_rates()[0] <= 1


@pytest.mark.parametrize("at", [0, 3, 12])
@pytest.mark.parametrize("lr", [math.nan, math.inf, -1e-3, torch.tensor(math.nan), torch.tensor(-1e-3)])
@pytest.mark.filterwarnings("ignore:a group's lr was set to")
def test_a_rate_that_is_none_counts_as_0(lr: Any, at: int) -> None:
    broken, resting = made(lr=1e-3), made(lr=1e-3)
    for optimizer, one in ((broken, lr), (resting, 0.0)):
        taken(optimizer, range(at))
        optimizer.param_groups[0]["lr"] = one
        taken(optimizer, range(at, at + 1))
        optimizer.param_groups[0]["lr"] = 1e-3
        taken(optimizer, range(at + 1, 20))
    assert same(broken.state_dict(), resting.state_dict())
    assert 1e-5 < broken.get_learning_rates()[0] <= 1


def test_arrays_that_take_part_in_turns_have_not_travelled_further() -> None:
    """As experts do.  What an absent one went in the climb does not count when the climb is over."""
    generator = torch.Generator().manual_seed(0)
    params = parameters([(32, 32)] * 8)
    optimizer = AutomagicCameAMP8bit(params, lr=1e-4, warmup_steps=1000, max_lr=1.0)
    (group,) = optimizer.param_groups
    steady, climbing = torch.randn(32, 32, generator=generator), True
    straightness: list[float] = []
    for t in range(60):
        for i, p in enumerate(params):
            noise = torch.randn(32, 32, generator=generator)
            p.grad = (noise + steady if t < 24 else noise) if i == t % 8 else None
        optimizer.step()
        climbing = float(group["automagic_peak_agreement"]) >= 0
        if not climbing:
            walked = sum(float(state["walk"].double().square().sum()) for state in optimizer.state.values())
            straightness.append(math.sqrt(walked / float(group["automagic_walk_energy"])))
    assert not climbing
    # Without it 3.7 at first, and still 2 after 16 steps.
    assert straightness[0] < 1.5
    assert max(straightness[:16]) < 1.8
