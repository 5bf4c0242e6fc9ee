"""`benchmark_optimizer` measures, and leaves everything exactly as it was."""

import copy

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from automagic_core.arrays.group_keys import SEARCH_KEYS
from automagic_torch import AutomagicCameAMP8bit, benchmark_optimizer, release_gradients
from tests.torch_side.torch_helpers import SMALL, run, same, snapshot


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.LayerNorm(24), torch.nn.Linear(24, 4))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("make", [lambda p: AutomagicCameAMP8bit(p, **SMALL | {"warmup_steps": 50}), torch.optim.AdamW])
def test_nothing_is_left_behind(make, steps):
    net, twin = model(), model()
    optimizer, other = make(net.parameters()), make(twin.parameters())
    run(optimizer, range(1, steps + 1))
    run(other, range(1, steps + 1))
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = snapshot(optimizer)
    kept = {p: dict(state) for p, state in optimizer.state.items()}
    gradients = [p.grad for p in net.parameters()]
    copies = copy.deepcopy(gradients)
    versions = [(p.data_ptr(), p._version) for p in net.parameters()]
    generator = torch.get_rng_state()

    result = benchmark_optimizer(net, optimizer, num_steps=4)

    assert same(snapshot(optimizer), before)
    assert not calls
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
    assert same([g for g in gradients if g is not None], [g for g in copies if g is not None])
    assert [(p.data_ptr(), p._version) for p in net.parameters()] == versions
    assert optimizer.state.keys() == kept.keys()
    assert all(optimizer.state[p][name] is tensor for p in kept for name, tensor in kept[p].items())
    assert torch.equal(torch.get_rng_state(), generator)
    # And the run goes on as one that was not measured.
    run(optimizer, range(steps + 1, steps + 3))
    run(other, range(steps + 1, steps + 3))
    assert same(snapshot(optimizer), snapshot(other))

    assert result["num_steps"] == 4
    assert result["parameters"] == sum(p.numel() for p in net.parameters())
    assert 0 < result["min_ms"] <= result["median_ms"]
    assert result["min_ms"] <= result["mean_ms"]
    assert result["peak_memory_bytes"] is None or torch.cuda.is_available()
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    shared = [group[key].nbytes for group in optimizer.param_groups for key in SEARCH_KEYS if key in group]
    assert result["state_bytes"] == held + sum(shared)


def test_a_step_that_fails_leaves_nothing_behind_either():
    net = model()
    optimizer = AutomagicCameAMP8bit(net.parameters(), **SMALL)
    LambdaLR(optimizer, lambda step: 0.5)
    run(optimizer, range(1, 3))
    before = snapshot(optimizer)
    optimizer._on_update = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        benchmark_optimizer(net, optimizer)
    assert same(snapshot(optimizer), before)


def test_released_gradients_come_back_for_the_time_of_the_measurement():
    net = model()
    optimizer = AutomagicCameAMP8bit(net.parameters(), **SMALL)
    release_gradients(optimizer)
    net(torch.ones(2, 16)).sum().backward()  # a step is open
    seen = []
    optimizer._on_update = lambda p, update: seen.append(bool(update.any()))
    benchmark_optimizer(net, optimizer, num_steps=2)
    assert len(seen) == 5 * len(list(net.parameters())), "five steps with a gradient for every array"
    assert all(seen)
    optimizer._on_update = None
    twin = model()
    other = AutomagicCameAMP8bit(twin.parameters(), **SMALL)
    release_gradients(other)
    twin(torch.ones(2, 16)).sum().backward()
    for o in (optimizer, other):
        o.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_what_it_measures_on():
    net = model()
    net[0].requires_grad_(False)
    extra = torch.nn.Parameter(torch.ones(1000))
    optimizer = AutomagicCameAMP8bit([*net.parameters(), extra], **SMALL)
    assert benchmark_optimizer(net, optimizer, 1)["parameters"] == 24 + 24 + 24 * 4 + 4
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        benchmark_optimizer(model(), optimizer)
    with pytest.raises(ValueError, match=r"num_steps = 0 is not valid; valid: an integer ≥ 1"):
        benchmark_optimizer(net, optimizer, 0)


def test_the_time_is_that_of_a_step(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("automagic_torch.watching.benchmark.time.perf_counter", lambda: next(clock) / 1000)
    net = model()
    result = benchmark_optimizer(net, torch.optim.SGD(net.parameters()), num_steps=5)
    assert [result[name] for name in ("mean_ms", "median_ms", "min_ms")] == pytest.approx([1.0] * 3)
    assert next(clock) == 10, "only the timed steps looked at the clock"


def test_no_copy_stays_in_memory():
    net = model()
    optimizer = AutomagicCameAMP8bit(net.parameters(), **SMALL)
    run(optimizer, range(1, 3))
    benchmark_optimizer(net, optimizer, num_steps=1)
    assert optimizer._owned.keys() <= set(net.parameters())
