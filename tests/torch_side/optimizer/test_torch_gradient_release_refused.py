"""What cannot be had while gradients are released is refused by name, and there is a way out."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from automagic_torch import AutomagicCameAMP8bit, load_adam_state, load_requantized, release_gradients
from automagic_torch.cameamp import batches
from automagic_torch.gradient_release import refuse_clipping
from tests.torch_side.torch_helpers import SMALL, parameters, same, set_gradients, snapshot

ALONE = {"cpu": 0, "other": 0}


def small(count=2, **fields):
    params = parameters([(8, 6)] * count)
    return params, AutomagicCameAMP8bit(params, **SMALL | fields)


def test_a_second_gradient_before_the_step_is_refused_and_the_step_can_be_closed():
    (a, b), optimizer = small()
    release_gradients(optimizer)
    (a.sum() + b.sum()).backward()
    before = [a.detach().clone(), b.detach().clone()]
    with pytest.raises(RuntimeError, match=r"parameter [01] of group 0 .*cannot be accumulated"):
        (a.sum() + b.sum()).backward()
    assert same(before, [a.detach(), b.detach()])
    with pytest.raises(RuntimeError, match="has a gradient again"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["automagic_step"] == 2


def test_two_backward_passes_over_different_parameters_are_one_step():
    (a, b), optimizer = small()
    release_gradients(optimizer)
    a.square().sum().backward()
    b.square().sum().backward()
    optimizer.step()
    (c, d), ordinary = small()
    (c.square().sum() + d.square().sum()).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "ARRAY_LIMIT", ALONE)
        ordinary.step()
    assert same(snapshot(ordinary), snapshot(optimizer))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise MemoryError("no memory left")


def of_adam(params):
    adam = torch.optim.AdamW(params)
    set_gradients(params, 0)
    adam.step()
    adam.zero_grad()
    return adam.state_dict()


WAYS_OUT = {
    "step": lambda optimizer, _: optimizer.step(),
    "load": lambda optimizer, kept: optimizer.load_state_dict(kept),
    "load_requantized": load_requantized,
    "load_adam_state": lambda optimizer, _: load_adam_state(optimizer, of_adam(parameters([(8, 6)] * 3))),
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_a_backward_pass_that_failed_half_way_is_named_by_the_next(way_out):
    (a, b, c), optimizer = small(3)
    release_gradients(optimizer)
    kept = optimizer.state_dict()
    with pytest.raises(MemoryError):
        (Fails.apply(a) * b).sum().backward()
    assert optimizer.state[b]["age"] == 1
    for p in (b, c):  # also where no parameter is the same
        with pytest.raises(RuntimeError, match="ended with an error after it had updated 1 parameters"):
            p.sum().backward()
    optimizer.zero_grad()
    WAYS_OUT[way_out](optimizer, kept)
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["automagic_step"] == (2 if way_out == "step" else 1)


def test_what_would_see_half_a_step_is_refused():
    (a, b), optimizer = small()
    release_gradients(optimizer)
    a.sum().backward()
    for act in (
        optimizer.state_dict,
        optimizer.__getstate__,
        lambda: optimizer.add_param_group({"params": parameters([(3,)])}),
    ):
        with pytest.raises(RuntimeError, match=r"between a backward pass .* and the call of step"):
            act()
    optimizer.step()
    assert len(optimizer.state_dict()["param_groups"]) == 1
    b.grad = torch.ones_like(b)  # as torch.distributed.checkpoint and others set them
    optimizer.step()
    assert optimizer.state[b]["age"] == 1
    assert b.grad is None


def test_stage_1_is_refused_by_name_whenever_it_is_turned_on():
    with pytest.raises(ValueError, match="group 0 has percentile_clipping = 90"):
        release_gradients(small(percentile_clipping=90)[1])
    (a,), optimizer = small(1)
    release_gradients(optimizer)
    with pytest.raises(ValueError, match="group 1 has percentile_clipping = 50"):
        optimizer.add_param_group({"params": parameters([(3,)]), "percentile_clipping": 50})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["automagic_percentile_clipping"] = 50
    before = a.detach().clone()
    with pytest.raises(ValueError, match="group 0 has percentile_clipping = 50"):
        a.sum().backward()
    assert torch.equal(a, before)
    optimizer.param_groups[0]["automagic_percentile_clipping"] = 100
    optimizer.zero_grad()
    a.sum().backward()
    optimizer.step()


def test_a_parameter_has_one_optimizer_and_a_dropped_one_lets_go():
    (a,), optimizer = small(1)
    release_gradients(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        release_gradients(optimizer)
    other = AutomagicCameAMP8bit([("x", parameters([(3,)])[0]), ("y", a)], **SMALL)
    with pytest.raises(ValueError, match="parameter 'y' has its gradient released by another optimizer"):
        release_gradients(other)
    assert not other.param_groups[0]["params"][0]._post_accumulate_grad_hooks
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    before = a.detach().clone()
    a.sum().backward()
    assert torch.equal(a, before)
    a.grad = None
    release_gradients(other)
    a.sum().backward()
    assert not torch.equal(a, before)


def test_a_removed_handle_leaves_an_ordinary_optimizer():
    (a, b), optimizer = small()
    handle = release_gradients(optimizer)
    a.sum().backward()
    handle.remove()
    b.sum().backward()
    assert a.grad is None
    assert b.grad is not None
    optimizer.step()
    assert [optimizer.state[p]["age"].item() for p in (a, b)] == [1, 1]
    set_gradients([a, b], 2)
    optimizer.step()
    assert a.grad is not None
    handle.remove()
    release_gradients(optimizer)


def test_a_scaler_sparse_gradients_and_wrappers_are_refused():
    (a,), optimizer = small(1)
    release_gradients(optimizer)
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(a.sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"GradScaler multiplied the loss.*use bfloat16"):
            scaler.step(optimizer)
        optimizer.step()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)

    embedding = nn.Embedding(5, 4, sparse=True)
    sparse = AutomagicCameAMP8bit(embedding.named_parameters(), **SMALL)
    release_gradients(sparse)
    with pytest.raises(RuntimeError, match="parameter 'weight' has a sparse gradient"):
        embedding(torch.tensor([1])).sum().backward()
    lookahead = SimpleNamespace(_base_optimizer=Accelerator(cpu=True).prepare(optimizer))
    refuse_clipping([lookahead, None], 0, "clip")
    refuse_clipping([torch.optim.AdamW([a]), None], 1, "clip")
    with pytest.raises(ValueError, match="clip = 1 would clip nothing"):
        refuse_clipping([lookahead], 1, "clip")
    for wrong in (Accelerator(cpu=True).prepare(optimizer), torch.optim.AdamW([a])):
        with pytest.raises(TypeError, match="not for A"):
            release_gradients(wrong)


@pytest.fixture
def processes():
    def begin(backend, count):
        dist.init_process_group(backend, rank=0, world_size=count, store=FakeStore() if count > 1 else dist.HashStore())

    yield begin
    dist.destroy_process_group()


def test_several_processes_are_refused_before_anything_changes(processes):
    (a,), optimizer = small(1)
    release_gradients(optimizer)
    processes("fake", 2)
    before = a.detach().clone()
    with pytest.raises(RuntimeError, match="2 processes"):
        a.sum().backward()
    assert torch.equal(a, before)
    with pytest.raises(RuntimeError, match="2 processes"):
        release_gradients(small()[1])


@pytest.mark.parametrize("as_views", [False, True])
def test_gradients_that_come_back_after_the_update_are_named(processes, as_views):
    processes("gloo", 1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3), gradient_as_bucket_view=as_views)
    optimizer = AutomagicCameAMP8bit(model.named_parameters(), **SMALL)
    release_gradients(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'module\.\w+' .* has a gradient again.*DistributedDataParallel"):
        optimizer.step()


def test_a_clip_after_the_backward_pass_returns_the_norm_of_nothing():
    """What docs/gradient_release.md says of it, and that a clip in a hook is one."""
    (a, b), optimizer = small()
    release_gradients(optimizer)
    b.register_hook(lambda g: g * (1.0 / (g.norm() + 1e-6)).clamp(max=1.0))
    seen = []
    b.register_hook(lambda g: seen.append(g.norm().item()))
    (1e3 * a.sum() + 1e3 * b.sum()).backward()
    assert torch.nn.utils.clip_grad_norm_([a, b], 1.0) == 0
    assert seen == [pytest.approx(1.0)]
    optimizer.step()


def test_a_handle_removed_within_a_step_still_refuses_a_second_update():
    (a,), optimizer = small(1)
    handle = release_gradients(optimizer)
    a.sum().backward()
    handle.remove()
    a.sum().backward()
    with pytest.raises(RuntimeError, match="was updated in the backward pass and has a gradient again"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[a]["age"].item() == 1
    a.sum().backward()
    assert a.grad is not None
