"""What is trained, and only that: frozen, tied, materialized, moved, cast and resized parameters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from automagic_torch import (
    AutomagicCameAMP8bit,
    ProgressiveQuantization,
    analyze_memory_usage,
    benchmark_optimizer,
    mark_lora,
    release_gradients,
)
from tests.torch_side.timm_parts import part_of_timm
from tests.torch_side.torch_helpers import same

FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 0.1, "warmup_steps": 4, "force_8bit": True, "min_8bit_size": 16}


def gradient(shape: torch.Size, step: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def trained(optimizer: AutomagicCameAMP8bit, params: list[nn.Parameter], steps: range) -> list[torch.Tensor]:
    for step in steps:
        for index, p in enumerate(params):
            p.grad = gradient(p.shape, 100 * step + index).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in params]


def linear(*shape: int) -> nn.Parameter:
    return nn.Parameter(gradient(torch.Size(shape), 99))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_frozen_parameters_may_have_any_dtype(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=False)
    alone, beside = linear(8, 6), linear(8, 6)
    optimizer = AutomagicCameAMP8bit([("base", frozen), ("weight", beside)], **FIELDS)
    expected = trained(AutomagicCameAMP8bit([alone], **FIELDS), [alone], range(6))
    assert same(trained(optimizer, [beside], range(6)), expected)
    assert torch.equal(frozen.detach(), torch.ones(3, 4).to(dtype))
    restored = AutomagicCameAMP8bit([("base", frozen), ("weight", linear(8, 6))], **FIELDS)
    restored.load_state_dict(optimizer.state_dict())
    optimizer.metrics()
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == 48


@pytest.mark.parametrize("kind", ["LoraConfig", "DoRA", "LoHaConfig", "LoKrConfig", "QLoRA"])
def test_models_of_peft_train_as_their_trained_parameters_do(kind: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential()
    if kind == "QLoRA":
        bnb = pytest.importorskip("bitsandbytes")
        base.add_module("fc", bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"))
        base.to("cpu")
    else:
        base.add_module("fc", nn.Linear(64, 64))
    config: Any = {"target_modules": ["fc"], "r": 8}
    made = {"DoRA": peft.LoraConfig, "QLoRA": peft.LoraConfig}.get(kind) or getattr(peft, kind)
    model = peft.get_peft_model(base, made(**config, **({"use_dora": True} if kind == "DoRA" else {})))
    assert mark_lora(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), **FIELDS)
    alone = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if name in alone and hasattr(p, "_is_lora_layer"):
            alone[name]._is_lora_layer = True
    of_trained = AutomagicCameAMP8bit(alone.items(), **FIELDS)
    for step in range(3):
        model(gradient(torch.Size((2, 64)), step)).square().sum().backward()
        for name, p in model.named_parameters():
            if name in alone:
                alone[name].grad = None if p.grad is None else p.grad.clone()
        for each in (optimizer, of_trained):
            each.step()
            each.zero_grad()
    for name, p in model.named_parameters():
        assert same(p.detach(), alone[name].detach() if name in alone else start[name]), name
    assert any(not same(p.detach(), start[name]) for name, p in model.named_parameters())


def test_a_parameter_is_frozen_and_unfrozen_in_mid_run() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), **FIELDS)
    for step, freezes in enumerate([False, True, True, False]):
        model[0].requires_grad_(not freezes)
        before = copy.deepcopy(model.state_dict())
        states = {p: dict(optimizer.state[p]) for p in model[0].parameters() if p in optimizer.state}
        model(gradient(torch.Size((4, 6)), step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name: not same(value, before[name]) for name, value in model.state_dict().items()}
        assert moved == {"0.weight": not freezes, "0.bias": not freezes, "1.weight": True, "1.bias": True}
        if freezes:
            for p, state in states.items():
                now = dict(optimizer.state[p])
                assert not now.pop("walk", torch.zeros(1)).any()  # a walk of the climb is over
                assert same(now, {name: x for name, x in state.items() if name != "walk"})
    fresh = AutomagicCameAMP8bit(model.named_parameters(), **FIELDS)
    fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("released", [False, True])
def test_a_group_that_is_frozen_at_first_has_its_warm_up_when_it_trains(released: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    groups = [{"params": layer.parameters()} for layer in model]
    optimizer = AutomagicCameAMP8bit(groups, **{**FIELDS, "warmup_steps": 4, "max_lr": 1.0})
    model[0].requires_grad_(False)
    if released:
        release_gradients(optimizer)
    for step in range(12):
        model[0].requires_grad_(step >= 6)
        model(gradient(torch.Size((4, 6)), step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [group["automagic_step"] for group in optimizer.param_groups] == [max(0, step - 5), step + 1]
    frozen, head = optimizer.get_learning_rates()
    assert frozen == pytest.approx(head), "both climbed for as long"
    model[0].requires_grad_(False)
    optimizer.step()
    assert [group["automagic_step"] for group in optimizer.param_groups] == [7, 13], "a group that has begun goes on"


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_tied_weight_listed_twice_takes_one_step_and_loads(named: bool) -> None:
    (once, other), (tied, beside) = (linear(8, 6), linear(6)), (linear(8, 6), linear(6))
    listed: Any = [("a", tied), ("b", tied), ("c", beside)] if named else [tied, tied, beside]
    plain = AutomagicCameAMP8bit([once, other], **FIELDS)
    optimizer = AutomagicCameAMP8bit(listed, **FIELDS)
    expected = trained(plain, [once, other], range(3))
    assert same(trained(optimizer, [tied, beside], range(3)), expected)
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == 54
    p, q = nn.Parameter(tied.detach().clone()), nn.Parameter(beside.detach().clone())
    restored = AutomagicCameAMP8bit([("a", p), ("b", p), ("c", q)] if named else [p, p, q], **FIELDS)
    restored.load_state_dict(optimizer.state_dict())
    expected = trained(plain, [once, other], range(3, 6))
    assert same(trained(restored, [p, q], range(3, 6)), expected)
    untied = AutomagicCameAMP8bit([linear(8, 6), linear(8, 6), linear(6)], **FIELDS)
    with pytest.raises(ValueError, match="numbers its parameters otherwise"):
        untied.load_state_dict(optimizer.state_dict())


def test_parameters_on_the_meta_device_are_materialized_later() -> None:
    def materialized(model: nn.Module) -> None:
        for index, p in enumerate(list(model.parameters())):
            torch.utils.swap_tensors(p, nn.Parameter(gradient(p.shape, index)))

    with torch.device("meta"):
        late = nn.Linear(6, 5)
    early = nn.Linear(6, 5)
    fields = FIELDS | {"percentile_clipping": 90}
    of_late = AutomagicCameAMP8bit(late.parameters(), **fields)
    materialized(late)
    materialized(early)
    of_early = AutomagicCameAMP8bit(early.parameters(), **fields)
    expected = trained(of_early, list(early.parameters()), range(6))
    assert same(trained(of_late, list(late.parameters()), range(6)), expected)
    assert same(of_late.state_dict(), of_early.state_dict())


def test_a_layer_that_was_not_called_yet_disturbs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "automagic_torch")
    later, model = nn.LazyLinear(3), nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 1))
    both = nn.ModuleList([later, model])
    optimizer = AutomagicCameAMP8bit(both.parameters(), verbose=True, **FIELDS)
    alone = AutomagicCameAMP8bit([*both[0].parameters()], **FIELDS)
    alone.step()
    assert alone.param_groups[0]["automagic_step"] == 0  # its search begins with its first gradient
    assert "57" not in analyze_memory_usage(optimizer)
    quantization = ProgressiveQuantization(optimizer, total_steps=4)
    for _ in range(3):
        model(torch.ones(4, 5)).square().mean().backward()
        before = model[1].weight.detach().clone()
        optimizer.step()
        quantization.step()
        assert not torch.equal(model[1].weight, before)
        optimizer.zero_grad()
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == 57
    assert "57" in analyze_memory_usage(optimizer)
    assert "57 parameters" in caplog.text
    assert optimizer.metrics()
    assert benchmark_optimizer(both, optimizer, 1)["parameters"] == 57
    optimizer.load_state_dict(optimizer.state_dict())
    later(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == 57 + 9


def test_a_group_whose_first_parameter_stays_on_the_meta_device_trains() -> None:
    unused = nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    alone, beside = linear(8, 6), linear(8, 6)
    expected = trained(AutomagicCameAMP8bit([alone], **FIELDS), [alone], range(6))
    assert same(trained(AutomagicCameAMP8bit([unused, beside], **FIELDS), [beside], range(6)), expected)


def test_parameters_left_on_the_meta_device_are_told() -> None:
    with torch.device("meta"):
        model = nn.Linear(6, 5)
    optimizer = AutomagicCameAMP8bit(model.parameters(), **FIELDS)
    model.to_empty(device="cpu")  # new parameters, which no optimizer knows
    model(torch.ones(1, 6)).sum().backward()
    with pytest.warns(UserWarning, match="2 parameters are on the meta device"):
        optimizer.step()


def test_a_warm_up_too_short_for_the_search_is_told_once() -> None:
    with pytest.warns(UserWarning, match="warmup_steps = 8 is too short"):
        optimizer = AutomagicCameAMP8bit([linear(8, 6)], lr=1e-3, warmup_steps=8)
    with warnings.catch_warnings(action="error"):
        optimizer.add_param_group({"params": [linear(4, 4)]})


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_is_cast_after_its_optimizer_was_made(dtype: torch.dtype, after: int) -> None:
    model = nn.Linear(6, 5)
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), **FIELDS)
    params = list(model.parameters())
    before = trained(optimizer, params, range(after))
    model.to(dtype)
    now = trained(optimizer, params, range(after, after + 2))
    assert all(p.dtype == dtype and not same(p.float(), q.float()) for p, q in zip(now, before, strict=True))
    assert all(p.isfinite().all() for p in now)
    restored = AutomagicCameAMP8bit([nn.Parameter(p) for p in now], **FIELDS)
    restored.load_state_dict(optimizer.state_dict())


def test_a_resized_parameter_is_named_before_anything_changes() -> None:
    first, second = linear(8, 6), linear(5, 4)
    optimizer = AutomagicCameAMP8bit([("first", first), ("second", second)], **FIELDS)
    trained(optimizer, [first, second], range(2))
    first.grad, second.grad = gradient(first.shape, 0), gradient(second.shape, 1)
    kept, steps = first.detach().clone(), optimizer.param_groups[0]["automagic_step"]
    second.data = torch.zeros(7, 4)
    with pytest.raises(RuntimeError, match=r"'second' has a gradient of shape \(5, 4\); its own is \(7, 4\)"):
        optimizer.step()
    second.grad = torch.ones(7, 4)
    with pytest.raises(RuntimeError, match=r"'second' has shape \(7, 4\) now, and states of shape \(5, 4\)"):
        optimizer.step()
    assert same((first.detach(), optimizer.param_groups[0]["automagic_step"]), (kept, steps))
    del optimizer.state[second]
    optimizer.step()
    assert (second != 0).all()


def test_a_parameter_moved_after_a_step_takes_its_states_along() -> None:
    p = linear(8, 6)
    optimizer = AutomagicCameAMP8bit([p], **FIELDS | {"optim_bits": 32, "percentile_clipping": 100})
    trained(optimizer, [p], range(2))
    moved = nn.Parameter(torch.empty(8, 6, device="meta"))  # the only other device that every machine has
    torch.utils.swap_tensors(p, moved)
    p.grad = torch.empty_like(p)
    optimizer.step()
    assert {value.device.type for value in optimizer.state[p].values()} == {"meta"}


def test_lookahead_of_timm_keeps_its_weights_in_the_state() -> None:
    lookahead = part_of_timm("timm.optim.lookahead").Lookahead
    params = [linear(8, 6), linear(6)]
    wrapped = lookahead(AutomagicCameAMP8bit(params, **FIELDS), k=2)
    for step in range(5):
        for index, p in enumerate(params):
            p.grad = gradient(p.shape, 10 * step + index)
        wrapped.step()
    saved = wrapped.state_dict()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    restored = lookahead(AutomagicCameAMP8bit(others, **FIELDS), k=2)
    restored.load_state_dict(saved)
    for step in range(5, 9):
        for index, pair in enumerate(zip(params, others, strict=True)):
            for p in pair:
                p.grad = gradient(p.shape, 10 * step + index)
        wrapped.step()
        restored.step()
    assert same([p.detach() for p in params], [p.detach() for p in others])
