"""Schedulers of torch and timm set the rate, and nothing else; the rate in force is theirs times the found factor."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedulers

from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.cameamp.groups import group_config
from tests.torch_side.timm_parts import part_of_timm

STEPS = 12
LR = 1e-3
ARGUMENTS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda _: 0.9},
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [3, 6]},
    "ConstantLR": {"total_iters": 4},
    "LinearLR": {"total_iters": 4},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 2 * STEPS},
    "CosineAnnealingLR": {"T_max": STEPS},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 2e-3, "step_size_up": 4},
    "OneCycleLR": {"max_lr": 2e-3, "total_steps": STEPS + 1, "final_div_factor": 10.0},
    "ReduceLROnPlateau": {"patience": 1},
    "SWALR": {"swa_lr": 1e-4, "anneal_epochs": 4},
}
TIMM: dict[str, dict[str, Any]] = {
    "CosineLRScheduler": {"t_initial": STEPS, "lr_min": 1e-5},
    "MultiStepLRScheduler": {"decay_t": [3, 6], "decay_rate": 0.5},
    "PlateauLRScheduler": {"patience_t": 1},
    "PolyLRScheduler": {"t_initial": STEPS, "lr_min": 1e-5},
    "StepLRScheduler": {"decay_t": 3, "decay_rate": 0.5},
    "TanhLRScheduler": {"t_initial": STEPS, "lr_min": 1e-5},
    "WSDLRScheduler": {"t_initial": STEPS, "decay_t": 4, "lr_min": 1e-5},
}
ABSTRACT = {"LRScheduler", "_LRScheduler", "SequentialLR", "ChainedScheduler"}


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    parts = [torch_schedulers.LinearLR(optimizer, total_iters=3), torch_schedulers.ExponentialLR(optimizer, 0.9)]
    return torch_schedulers.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    parts = [torch_schedulers.LinearLR(optimizer, total_iters=3), torch_schedulers.ExponentialLR(optimizer, 0.9)]
    return torch_schedulers.ChainedScheduler(parts)


def made(name: str, optimizer: torch.optim.Optimizer) -> Any:
    if name in ("SequentialLR", "ChainedScheduler"):
        return (sequential if name == "SequentialLR" else chained)(optimizer)
    if name in TIMM:
        return getattr(part_of_timm("timm.scheduler"), name)(optimizer, **TIMM[name])
    module = torch.optim.swa_utils if name == "SWALR" else torch_schedulers
    return getattr(module, name)(optimizer, **ARGUMENTS[name])


def test_no_scheduler_of_torch_is_left_out() -> None:
    classes = {
        name
        for name, found in inspect.getmembers(torch_schedulers, inspect.isclass)
        if issubclass(found, torch_schedulers.LRScheduler)
    }
    assert classes <= ARGUMENTS.keys() | ABSTRACT


def test_no_scheduler_of_timm_is_left_out() -> None:
    module = part_of_timm("timm.scheduler")
    assert {name for name in dir(module) if name.endswith("LRScheduler")} <= TIMM.keys()


def rates_of_a_run(name: str, make: Any) -> tuple[list[list[float]], list[list[float]], Any]:
    """The groups' `lr` at every step, the rates in force, and the optimizer."""
    torch.manual_seed(0)
    groups = [{"params": nn.Linear(6, 4).parameters()}, {"params": nn.Linear(4, 6).parameters(), "lr_scale": 0.5}]
    optimizer = make(groups)
    scheduler = made(name, optimizer)
    scheduled, in_force = [], []
    for step in range(STEPS):
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + index)) + 1.0
        scheduled.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if isinstance(optimizer, AutomagicCameAMP8bit):
            in_force.append(optimizer.get_learning_rates())
        if name == "ReduceLROnPlateau":
            scheduler.step(1.0)
        elif name in TIMM:
            scheduler.step(step + 1, 1.0)
        else:
            scheduler.step()
    return scheduled, in_force, optimizer


@pytest.mark.parametrize("name", [*ARGUMENTS, "SequentialLR", "ChainedScheduler", *TIMM])
def test_the_rate_in_force_is_the_scheduled_one(name: str) -> None:
    # Most schedules leave these limits, which bound what the search finds and nothing else.
    narrow: dict[str, Any] = {"lr": LR, "min_lr": LR, "max_lr": LR, "optim_bits": 32}
    fields: dict[str, Any] = {"lr": LR, "min_lr": 1e-12, "max_lr": 0.1, "optim_bits": 32}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"group\[.betas.\\] differs")
        warnings.filterwarnings("ignore", "Detected call of|The epoch parameter")
        wanted, _, _ = rates_of_a_run(name, lambda groups: torch.optim.AdamW(groups, lr=LR))
        make = lambda groups: AutomagicCameAMP8bit(groups, **narrow, warmup_steps=0)  # noqa: E731
        scheduled, in_force, off = rates_of_a_run(name, make)
        assert scheduled == wanted
        for a, b in zip(in_force, wanted, strict=True):
            assert a == pytest.approx(b, rel=1e-6)  # float32
        # With the search on, the factor of a step is exp ℓ before it.
        found: list[list[float]] = []

        def searching(groups: Any) -> AutomagicCameAMP8bit:
            optimizer = AutomagicCameAMP8bit(groups, **fields, warmup_steps=STEPS, straightness=0.5)
            optimizer.register_step_pre_hook(
                lambda o, *_: found.append([float(g["automagic_log_rate_scale"].exp()) for g in o.param_groups])
            )
            return optimizer

        scheduled, in_force, on = rates_of_a_run(name, searching)
    assert scheduled == wanted
    assert found[-1][0] > 1.5 * found[1][0], "the search found something"
    last = [lr * factor for lr, factor in zip(wanted[-1], found[-1], strict=True)]
    assert in_force[-1] == pytest.approx(last, rel=1e-6)
    for optimizer, given in ((off, narrow), (on, fields)):
        for group in optimizer.param_groups:
            config = group_config(group)
            wanted_fields = (given["min_lr"], given["max_lr"], (0.9, 0.99, 0.999))
            assert (config.min_lr, config.max_lr, config.betas) == wanted_fields


def test_a_limit_is_read_by_its_name_but_is_no_entry() -> None:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=LR, max_lr=0.1, optim_bits=32)
    optimizer.param_groups[0]["automagic_max_lr"] = 0.2
    restored = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=LR, optim_bits=32)
    restored.load_state_dict(optimizer.state_dict())
    assert type(optimizer.state_dict()["param_groups"][0]) is dict, "what is saved needs no class of ours"
    for other in (optimizer, restored, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (group,) = other.param_groups
        assert (group["min_lr"], group["max_lr"], group["factored"]) == (1e-7, 0.2, "second_moment")
        assert "max_lr" not in group
        assert group.get("max_lr") is None, "Megatron's scheduler would take it for its own"
        with pytest.raises(KeyError, match="momentum"):
            group["momentum"]
        torch_schedulers.OneCycleLR(other, **ARGUMENTS["OneCycleLR"])
        assert (group["max_lr"], group["automagic_max_lr"]) == (2e-3, 0.2)


def test_a_field_written_by_its_plain_name_is_told_once(recwarn: Any) -> None:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=LR, optim_bits=32)
    optimizer.param_groups[0]["max_lr"] = 0.5
    for _ in range(2):
        optimizer.step()
    (told,) = [str(w.message) for w in recwarn]
    assert told == "group['max_lr'] is not read; the field is group['automagic_max_lr']"


@pytest.mark.parametrize("scheduled", [False, True])
def test_what_a_group_holds_and_nobody_uses_is_told(scheduled: bool) -> None:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=LR, optim_bits=32)
    if scheduled:
        torch_schedulers.LambdaLR(optimizer, lambda t: 1.0)
    optimizer.param_groups[0].update(max_lr=0.5, lr=float("nan"))
    with (
        pytest.warns(UserWarning, match=r"group\['max_lr'\] is not read"),
        pytest.warns(UserWarning, match="lr was set to nan"),
    ):
        optimizer.step()


def test_a_scheduler_keeps_rates_of_its_own_and_no_other_field(recwarn: Any) -> None:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=LR, optim_bits=32)
    torch_schedulers.OneCycleLR(optimizer, **ARGUMENTS["OneCycleLR"])  # which changes betas too, and that is told
    optimizer.step()
    optimizer.param_groups[0]["warmup_steps"] = 3
    optimizer.step()
    (told,) = [str(w.message) for w in recwarn if "is not read" in str(w.message)]
    assert told == "group['warmup_steps'] is not read; the field is group['automagic_warmup_steps']"


def test_changed_betas_are_told_once(recwarn: Any) -> None:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=1e-4, optim_bits=32)
    optimizer.param_groups[0]["betas"] = (0.5, 0.99, 0.999)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.warns(UserWarning, match="which alone is read"):
        optimizer.step()
    optimizer.step()
    assert not recwarn.list


@pytest.mark.parametrize("whole", [False, True])
def test_a_rate_of_zero_stays_zero_until_it_is_set(whole: bool) -> None:
    resting, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    if whole:
        optimizer = AutomagicCameAMP8bit([resting], lr=0.0, warmup_steps=0, optim_bits=32)
    else:
        groups = [{"params": [resting], "lr": 0.0}, {"params": [other]}]
        optimizer = AutomagicCameAMP8bit(groups, lr=1e-4, warmup_steps=0, optim_bits=32)
    for step in range(6):
        for p in (resting, other):
            p.grad = torch.ones_like(p)
        if step == 3:
            assert torch.equal(resting.detach(), torch.ones(3, 4)), "a rate of 0 moves nothing"
            assert (optimizer.param_groups[0]["lr"], optimizer.get_learning_rates()[0]) == (0.0, 0.0)
            optimizer.param_groups[0]["lr"] = 1e-4
        optimizer.step()
    assert optimizer.get_learning_rates()[0] == pytest.approx(1e-4)
    assert (resting.detach() < 1).all()
    assert whole or (other.detach() < 1).all()


def test_methods_and_groups_tell_the_rate_in_force() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3, 4))]}, {"params": [nn.Parameter(torch.ones(4))], "lr": 2e-4}]
    optimizer = AutomagicCameAMP8bit(groups, lr=1e-4, warmup_steps=8, max_lr=0.1, optim_bits=32)
    first = [float(group["effective_lr"]) for group in optimizer.param_groups]
    assert optimizer.get_learning_rates() == first
    for _ in range(8):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones_like(group["params"][0])
        before = optimizer.metrics().get("rate/max")
        optimizer.step()
    rates = optimizer.get_learning_rates()
    assert rates[0] > 1e-4, "the search is at work"
    assert max(rates) == pytest.approx(before, rel=0.7), "near the largest rate of a row"
    assert optimizer.get_avg_learning_rate() == pytest.approx(sum(rates) / 2)
    optimizer.add_param_group({"params": [], "lr": 5e-2})
    assert optimizer.get_avg_learning_rate() == pytest.approx(sum(rates) / 2), "an empty group does not count"
    del optimizer.param_groups[-1]
    assert [float(f"{group['effective_lr']:.8e}") for group in optimizer.param_groups] == pytest.approx(rates)
    restored = AutomagicCameAMP8bit([{"params": [nn.Parameter(p.detach().clone())]} for p in _params(optimizer)])
    restored.load_state_dict(optimizer.state_dict())
    assert restored.get_learning_rates() == rates
    state = optimizer.state_dict()
    state["param_groups"] = [{k: v for k, v in g.items() if k != "effective_lr"} for g in state["param_groups"]]
    restored.load_state_dict(state)  # it is no input
    found = [group["lr"] * float(group["automagic_log_rate_scale"].exp()) for group in optimizer.param_groups]
    assert restored.get_learning_rates() == pytest.approx(found), "with the factor after the last votes"
    assert found[0] > rates[0]


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _searched(lr: float = LR, **fields: Any) -> AutomagicCameAMP8bit:
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], lr=lr, max_lr=1, warmup_steps=20, **fields)
    _go_on(optimizer, 25)
    return optimizer


def _go_on(optimizer: AutomagicCameAMP8bit, steps: int = 1) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        p.grad = torch.ones(3)
        optimizer.step()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_rate_that_rises_after_the_search_is_told_once(loaded: bool, recwarn: Any) -> None:
    """What the search found is a factor: 1e-3 after a search at 1e-5 is a hundred times what was found."""
    optimizer = _searched(lr=1e-5)
    if loaded:
        saved, optimizer = optimizer.state_dict(), _searched(lr=1e-5)
        optimizer.load_state_dict(saved)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = 1e-3
        _go_on(optimizer)
    (told,) = [str(w.message) for w in recwarn if "rose" in str(w.message)]
    assert told.startswith("group 0: its lr rose from 1e-05 to 0.001 after the search")
    optimizer.param_groups[0]["automagic_log_rate_scale"].zero_()  # what the page of errors says
    _go_on(optimizer)
    assert optimizer.get_learning_rates() == [pytest.approx(1e-3)]


def test_schedules_that_begin_anew_and_searches_that_are_off_are_not_told(recwarn: Any) -> None:
    optimizer = _searched()
    schedule = torch_schedulers.CosineAnnealingWarmRestarts(optimizer, 7)
    for _ in range(30):
        _go_on(optimizer)
        schedule.step()
        restored = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))])
        restored.load_state_dict(optimizer.state_dict())
        restored.param_groups[0]["lr"] = LR
        _go_on(restored)
    for fields in ({"search_gain": 0.0}, {"lr": torch.tensor(LR)}):
        optimizer = _searched(**fields)
        optimizer.param_groups[0]["lr"] = 100 * LR
        _go_on(optimizer)
    assert not [str(w.message) for w in recwarn if "rose" in str(w.message)]


def test_fields_that_were_handed_on_as_defaults_are_not_told(recwarn: Any) -> None:
    """`ZeroRedundancyOptimizer` gives the constructor's keywords to the groups, too."""
    fields = {"max_lr": 1, "search_gain": 0, "warmup_steps": 0, "lr": LR, "optim_bits": 32}
    optimizer = AutomagicCameAMP8bit([nn.Parameter(torch.ones(3))], **fields)
    optimizer.param_groups[0].update(fields)
    _go_on(optimizer)
    assert not recwarn.list
    optimizer.param_groups[0]["max_lr"] = 2
    with pytest.warns(UserWarning, match=r"group\['max_lr'\] is not read"):
        _go_on(optimizer)
