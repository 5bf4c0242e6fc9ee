"""Section 5.8 in PyTorch: what moves the rate, what never lowers it, what counts, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from automagic_core import Slot, rounding_key, walk_signs
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.codec.random_bits import signs
from tests.torch_side.torch_helpers import parameters, same

SHAPES = ((60, 5), (9,))
FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 1.0, "warmup_steps": 100, "weight_decay": 0.0, "optim_bits": 32}
# Gradients that alternate in sign, with a mean of 0.4: the path is straight all the same.
DRIFT = (1.4, -0.6)


def taken(optimizer: AutomagicCameAMP8bit, steps: range, factor: Callable[[int], float] = lambda t: 1.0) -> float:
    """ℓ of the first group after steps with one and the same gradients, times a factor for each step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for index, p in enumerate(params):
            p.grad = factor(t) * torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        optimizer.step()
    return float(optimizer.param_groups[0]["automagic_log_rate_scale"])


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
    optimizer = AutomagicCameAMP8bit([p], **FIELDS)
    for t in range(30):
        p.grad = 0.3 + torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    distance = float((p.detach() - start).square().sum())
    # A sum of 2,000 squares: 4 of its standard errors, where the rows are normal.
    assert float(optimizer.state[p]["walk"].square().sum()) == pytest.approx(distance, rel=4 * math.sqrt(2 / 2000))


def test_a_straight_path_raises_the_rate_and_a_random_walk_does_not() -> None:
    assert taken(made(), range(40)) > 1
    noisy = made()
    found = []
    for t in range(60):
        for index, p in enumerate(noisy.param_groups[0]["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2 * t + index))
        noisy.step()
        found.append(float(noisy.param_groups[0]["automagic_log_rate_scale"]))
    # Momentum itself runs straight for about ten steps.
    assert found[19] == found[-1] < 0.3


def test_gradients_that_alternate_stop_a_search_that_the_walk_alone_would_go_on_with() -> None:
    def drift(t: int) -> float:
        return DRIFT[t % 2]

    assert taken(made(), range(40), drift) == 0
    assert taken(made(agreement_floor=-1), range(40), drift) > 0.5
    # What was found before stays.  The average of the votes needs a few steps.
    optimizer = made()
    before = taken(optimizer, range(15))
    soon = taken(optimizer, range(15, 30), drift)
    assert before < soon == taken(optimizer, range(30, 40), drift)


def test_the_rate_that_was_found_never_falls_and_a_scheduled_one_is_never_limited() -> None:
    optimizer = made(max_lr=1e-2)
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
    votes, walk = 60 + 2, 4 * (60 + 1)
    masked = {"lr_mask", "last_polarity"} if mask else set()
    assert names["on"] - names["off"] == {"walk", "last_polarity"} - masked
    assert names["walk alone"] - names["off"] == {"walk"}
    assert names["off"] & {"walk", "last_polarity", "lr_mask"} == masked
    assert not {"walk", "last_polarity"} & (names["on, later"] | names["walk alone, later"])
    assert held["walk alone"] - held["off"] == walk
    # Version 0.1.0 held the votes and `lr_mask`: with the same fields it is one float32 for each row more.
    assert held["on"] - held["off"] == walk + (0 if mask else votes)


def test_what_is_absent_or_skipped_keeps_its_walk_and_counts_with_it() -> None:
    always, expert, bad = params = parameters(((8, 6), (7, 5), (4,)))
    optimizer = AutomagicCameAMP8bit(params, **FIELDS | {"max_lr": 1e6}, agreement_floor=-1)
    (group,) = optimizer.param_groups
    taken(optimizer, range(30))  # the ramp is over
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
        rise = 0.1 * math.log(math.sqrt(walked / energy) / 1.5) if moved else 0.0
        assert rise > 0.01 or not moved
        assert float(group["automagic_log_rate_scale"]) == pytest.approx(ell + rise, abs=1e-6), step


def test_every_group_searches_by_itself() -> None:
    steady, alternating = parameters([(60, 5), (60, 5)])
    optimizer = AutomagicCameAMP8bit([{"params": [steady]}, {"params": [alternating], "lr": 4e-3}], **FIELDS)
    alone = AutomagicCameAMP8bit(parameters([(60, 5)]), **FIELDS)
    g = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    for t in range(30):
        steady.grad, alternating.grad = g.clone(), DRIFT[t % 2] * g
        optimizer.step()
    found = [float(group["automagic_log_rate_scale"]) for group in optimizer.param_groups]
    assert found == [taken(alone, range(30)), 0.0]
    assert found[0] > 0.5
