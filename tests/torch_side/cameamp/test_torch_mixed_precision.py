"""Loss scaling and autocast: `torch.amp` around the optimizer, on a CPU."""

import io

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import SMALL, parameters, same, snapshot


def scaled_run(steps, scaler, optimizer, bad=()):
    """The documented order: scale, backward, unscale_, clip, step, update."""
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        optimizer.zero_grad()
        target = torch.randn(params[0].shape, generator=torch.Generator().manual_seed(step))
        scaler.scale(((params[0] - target) ** 2).sum()).backward()
        if step in bad:
            params[0].grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()


def make():
    return AutomagicCameAMP8bit(parameters([(8, 16)]), percentile_clipping=90, **SMALL)


def new_scaler(enabled=True):
    # Powers of two, so that scaling changes no bit; the scale doubles after every second step.
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2, enabled=enabled)


def test_scaled_gradients_give_the_bits_of_unscaled_ones_and_a_bad_step_is_none():
    scaled, plain = make(), make()
    scaler = new_scaler()
    scaled_run(range(9), scaler, scaled, bad=(3, 6))
    scaled_run([step for step in range(9) if step not in (3, 6)], new_scaler(enabled=False), plain)
    assert scaled.param_groups[0]["automagic_step"] == 7
    assert scaler.get_scale() != 256.0
    assert same(snapshot(scaled), snapshot(plain))


@pytest.mark.parametrize("saved_at", [2, 3, 7])  # before and after a skipped step, and after the warm-up
def test_a_run_with_a_scaler_goes_on_bit_for_bit(saved_at):
    optimizer, scaler = make(), new_scaler()
    scaled_run(range(saved_at), scaler, optimizer, bad=(2,))
    file = io.BytesIO()
    weights = optimizer.param_groups[0]["params"][0].detach()
    torch.save([optimizer.state_dict(), scaler.state_dict(), weights], file)
    scaled_run(range(saved_at, 10), scaler, optimizer, bad=(2,))

    file.seek(0)
    states, scale, weights = torch.load(file, weights_only=True)
    restored, other_scaler = make(), new_scaler()
    with torch.no_grad():
        restored.param_groups[0]["params"][0].copy_(weights)
    restored.load_state_dict(states)
    other_scaler.load_state_dict(scale)
    scaled_run(range(saved_at, 10), other_scaler, restored, bad=(2,))
    assert same(snapshot(restored), snapshot(optimizer))
    assert other_scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast_trains(dtype):
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    y = torch.tanh(x @ torch.randn(16, 4))
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)
    optimizer = AutomagicCameAMP8bit(model.parameters(), **SMALL | {"lr": 1e-2, "search_gain": 0})
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {dtype}
    assert losses[-1] < 0.1 * losses[0]
    floats = {t.dtype for state in optimizer.state.values() for t in state.values() if t.is_floating_point()}
    assert floats == {torch.float32}
