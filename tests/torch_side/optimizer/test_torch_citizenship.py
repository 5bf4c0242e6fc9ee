"""The optimizer as a citizen of torch: schedulers, scalers, closures, dtypes, memory formats, refusals."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from automagic_core import PROFILES
from automagic_torch import (
    AutomagicCameAMP8bit,
    create_improved_8bit_optimizer,
)
from tests.torch_side.torch_helpers import SHAPES, SMALL, parameters, run, same, set_gradients, snapshot


def test_the_closure_runs_with_gradients_and_its_loss_comes_back():
    (p,) = parameters([(3, 4)])
    optimizer = AutomagicCameAMP8bit([p], **SMALL)
    before = p.detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad(set_to_none=True)
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx((before**2).sum().item())
    assert not torch.equal(p, before)
    assert optimizer.step() is None


def test_schedulers_set_any_rate_zero_and_beyond_the_limits_included():
    (p,) = parameters([(3, 4)])
    optimizer = AutomagicCameAMP8bit([p], **SMALL)
    factors = [1.0, 0.0, 500.0, 1e-9, 1.0]
    scheduler = LambdaLR(optimizer, lambda step: factors[step])
    moved = []
    optimizer._on_update = lambda _, delta: moved.append(delta.abs().max().item())
    for step in range(1, 5):
        set_gradients([p], step)
        optimizer.step()
        scheduler.step()
    assert moved[1] == 0.0
    assert 0 < moved[3] < moved[0] < moved[2]


def test_the_defaults_make_another_optimizer():
    optimizer = AutomagicCameAMP8bit(parameters(), **SMALL | {"layout": "flax", "profile": "memory_optimized"})
    optimizer.load_state_dict(optimizer.state_dict())
    other = type(optimizer)(parameters(), **optimizer.defaults)
    assert other.defaults == {k: v for k, v in optimizer.defaults.items() if k != "differentiable"}  # torch's own
    third = type(optimizer)(parameters(), **optimizer.defaults | {"factored": "none"})
    assert third.param_groups[0]["automagic_factored"] == "none"


def test_a_tensor_rate_is_a_rate():
    plain, tensor = parameters(), parameters()
    by_number = AutomagicCameAMP8bit(plain, **SMALL)
    by_tensor = AutomagicCameAMP8bit(tensor, **SMALL | {"lr": torch.tensor(1e-3)})
    schedulers = [CosineAnnealingLR(optimizer, 8) for optimizer in (by_number, by_tensor)]
    for step in range(1, 8):
        for optimizer, scheduler in zip((by_number, by_tensor), schedulers, strict=True):
            run(optimizer, range(step, step + 1))
            scheduler.step()
    assert isinstance(by_tensor.param_groups[0]["lr"], torch.Tensor)
    for p, q in zip(plain, tensor, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_gradient_scaler():
    scaled, plain = parameters([(8, 6)]), parameters([(8, 6)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with_scaler, without = (AutomagicCameAMP8bit(params, **SMALL) for params in (scaled, plain))
    for step in range(4):
        for params in (scaled, plain):
            params[0].grad = None
        scaler.scale((scaled[0] ** 2).sum()).backward()
        if step == 2:
            scaled[0].grad[0, 0] = torch.inf
        else:
            (plain[0] ** 2).sum().backward()
            without.step()
        scaler.step(with_scaler)
        scaler.update()
    assert with_scaler.param_groups[0]["automagic_step"] == 3
    assert same(snapshot(with_scaler), snapshot(without))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bits", [8, 32])
def test_memory_formats_make_no_difference(dtype, bits):
    def straight():
        return [torch.nn.Parameter(p.detach()) for p in parameters([(4, 3, 3, 3), (6, 8)], dtype)]

    conv, dense = straight()
    odd = [
        torch.nn.Parameter(conv.detach().clone(memory_format=torch.channels_last)),
        torch.nn.Parameter(dense.detach().t().contiguous().t()),
    ]
    assert not any(p.is_contiguous() for p in odd)
    optimizers = [AutomagicCameAMP8bit(params, optim_bits=bits, **SMALL) for params in (straight(), odd)]
    for step in range(1, 7):
        for optimizer in optimizers:
            params = optimizer.param_groups[0]["params"]
            set_gradients(params, step)
            for p in params:  # gradients come in their parameter's format
                p.grad = torch.empty_like(p).copy_(p.grad)
            optimizer.step()
    assert same(*map(snapshot, optimizers))
    assert all(t.is_contiguous() for state in optimizers[1].state.values() for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_shape_steps_and_keeps_float32_statistics(dtype):
    params = parameters([*SHAPES, (0,), (3, 0)], dtype)
    optimizer = AutomagicCameAMP8bit(
        params, **SMALL | {"search_gain": 0}
    )  # whose first steps few numbers of 16 bits would feel
    before = [p.detach().clone() for p in params]
    run(optimizer, range(1, 8))
    for p, old in zip(params, before, strict=True):
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, old)
        assert {t.dtype for t in optimizer.state[p].values()} <= {torch.float32, torch.uint8, torch.int32}
    assert not optimizer.state[params[-1]]
    optimizer.load_state_dict(optimizer.state_dict())
    assert {t.dtype for t in optimizer.state[params[2]].values()} <= {torch.float32, torch.uint8, torch.int32}


def test_zero_rate_and_zero_gradients_on_fresh_state_change_nothing():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        params = parameters([*SHAPES, (0, 2)], dtype)
        optimizer = AutomagicCameAMP8bit(params, **SMALL)
        before = [p.detach().clone() for p in params]
        optimizer.param_groups[0]["lr"] = 0.0
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2e15])
@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_gradient_leaves_its_array_exactly_as_it_was(bits, bad, at, dtype):
    params = parameters([(8, 6), (5,)], dtype)
    optimizer = AutomagicCameAMP8bit(params, optim_bits=bits, torque_decay=0.9, **SMALL)
    other = AutomagicCameAMP8bit(parameters([(8, 6), (5,)], dtype), optim_bits=bits, torque_decay=0.9, **SMALL)
    run(optimizer, range(1, at))
    run(other, range(1, at))
    before = params[0].detach().clone(), dict(optimizer.state[params[0]])
    set_gradients(params, at)
    params[0].grad[2, 3] = bad
    optimizer.step()
    set_gradients(other.param_groups[0]["params"], at)
    other.param_groups[0]["params"][0].grad = None
    other.step()
    assert same(params[0].detach(), before[0])
    state = dict(optimizer.state[params[0]])
    assert state.pop("skipped_steps").item() == 1
    if before[1]:
        assert before[1].pop("skipped_steps").item() == 0
        assert same(state, {key: before[1][key] for key in state})
    else:
        assert all(not t.any() for key, t in state.items() if key != "torque_mean")
    # the rest of the group does as if the bad gradient were none
    assert same(params[1].detach(), other.param_groups[0]["params"][1].detach())
    assert same(
        optimizer.param_groups[0]["automagic_log_rate_scale"], other.param_groups[0]["automagic_log_rate_scale"]
    )
    run(optimizer, range(at + 1, at + 3))
    assert params[0].isfinite().all()
    assert optimizer.state[params[0]]["age"].item() == at + 1


def test_parameters_without_gradient_take_no_part():
    first, second = parameters([(8, 6), (8, 6)])
    optimizer = AutomagicCameAMP8bit([first, second], **SMALL)
    second.requires_grad_(False)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert second not in optimizer.state
    # Adam would hold nothing for it either.
    assert optimizer.get_memory_efficiency_report()["total_parameters"] == first.numel()
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert optimizer.state[first]["age"].item() == 1
    assert optimizer.param_groups[0]["automagic_step"] == 2


def test_sparse_gradients_are_refused_by_name_before_anything_changes():
    table = torch.nn.Embedding(10, 4, sparse=True)
    (dense,) = parameters([(4, 4)])
    optimizer = AutomagicCameAMP8bit([("dense", dense), ("table", table.weight)], **SMALL)
    dense.grad = torch.ones_like(dense)
    table(torch.tensor([1, 2])).sum().backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 'table' has a sparse gradient"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


@pytest.mark.parametrize("profile", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in PROFILES)])
def test_it_trains(profile):
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    y = torch.tanh(x @ torch.randn(12, 3))
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    fields = {"lr": 1e-4, "max_lr": 1e-1, "warmup_steps": 60, "force_8bit": True, "min_8bit_size": 64}
    optimizer = create_improved_8bit_optimizer(model.parameters(), profile, **fields)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert optimizer.param_groups[0]["automagic_log_rate_scale"] > 1


def test_a_gradient_that_is_negated_when_it_is_read():
    found = []
    for lazy in (True, False):
        (p,) = parameters([(600, 600)])
        p._is_lora_layer = True
        g = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
        p.grad = torch._neg_view(g) if lazy else -g
        AutomagicCameAMP8bit([p], lr=1e-3, warmup_steps=0).step()
        found.append(p.detach())
    assert torch.equal(*found)


def test_parameters_that_are_negated_when_they_are_read():
    params = [torch.nn.Parameter(torch._neg_view(p.detach())) for p in parameters([(8, 6)] * 3)]
    twins = [torch.nn.Parameter(p.detach().resolve_neg()) for p in params]
    for several in (params, twins):
        run(AutomagicCameAMP8bit(several, **SMALL), range(1, 4))
    assert same([p.detach().resolve_neg() for p in params], [p.detach() for p in twins])
