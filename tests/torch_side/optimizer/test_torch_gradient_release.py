"""Arrays are updated in the backward pass and their gradients freed, with the results of an ordinary step."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from automagic_torch import AutomagicCameAMP8bit, mark_embeddings, release_gradients
from automagic_torch.cameamp import batches
from tests.torch_side.adapter_models import adapted_model, optimizer_of, tokens
from tests.torch_side.optimizer.test_hf_trainer import arguments, trained
from tests.torch_side.stages.test_torch_stage_chain import stages
from tests.torch_side.torch_helpers import SMALL, parameters, same, set_gradients, snapshot, through_a_file

ALONE = {"cpu": 0, "other": 0}
FIELDS = SMALL | stages("edges", "frequencies", "low_rank") | {"warmup_steps": 6}


class Net(nn.Module):
    """A tied embedding, a convolution, blocks of one shape, a scalar, and a branch that is not always used."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.branch = nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.ones(()))
        self.use_branch = True
        self.run = lambda block, x: block(x)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.conv(x.mT).mT
        for block in self.blocks:
            x = torch.tanh(self.run(block, x))
        if self.use_branch:
            x = x + self.branch(x)
        return (self.gain * x) @ self.embedding.weight.mT


def backward(model, step):
    ids = torch.randint(12, (4, 7), generator=torch.Generator().manual_seed(step))
    loss = F.cross_entropy(model(ids).float().view(-1, 12), ids.view(-1).roll(1))
    loss.backward()
    return loss


class Run:
    """Nine steps in which much happens: a group and parameters come and go, a gradient is NaN, a checkpoint loads."""

    def __init__(self, released, dtype=torch.float32, checkpointing=None, closure=False, **fields):
        torch.manual_seed(0)
        self.model, self.fields, self.released, self.closure = Net().to(dtype), FIELDS | fields, released, closure
        mark_embeddings(self.model)
        self.model.blocks[1].weight._is_lora_layer = self.model.blocks[2].weight._is_lora_layer = True
        if checkpointing is not None:
            self.model.run = lambda block, x: checkpoint(block, x, use_reentrant=checkpointing == "reentrant")
        self.model.conv.bias.requires_grad_(False)
        self.bad = False
        self.model.blocks[1].weight.register_hook(lambda g: g * torch.nan if self.bad else g)
        named = list(self.model.named_parameters())
        first = [(name, p) for name, p in named if "blocks" in name]
        other = [(name, p) for name, p in named if "blocks" not in name and "branch" not in name]
        self.groups = [{"params": first}, {"params": other, "weight_decay": 0.1, "lr": 3e-3}]
        self.begin()

    def begin(self):
        self.optimizer = AutomagicCameAMP8bit([dict(group) for group in self.groups], **self.fields)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.handle = release_gradients(self.optimizer) if self.released else None

    def step(self, number):
        model = self.model
        model.use_branch, self.bad = number != 4, number == 5
        if number == 3:
            branch = {"params": list(model.branch.named_parameters(prefix="branch"))}
            self.groups.append(branch)
            self.optimizer.add_param_group(dict(branch))
        if number in (4, 6):
            model.conv.weight.requires_grad_(number == 6)
        if number == 8:
            model.conv.bias.requires_grad_(True)
        if number == 7:
            kept = through_a_file(self.optimizer.state_dict())
            if self.handle is not None:
                self.handle.remove()
            self.begin()
            self.optimizer.load_state_dict(kept)
        if self.closure:
            loss = self.optimizer.step(lambda: backward(model, number))
        else:
            loss = backward(model, number)
            self.optimizer.step()
        self.scheduler.step()
        if not self.released:
            self.optimizer.zero_grad()
        return loss.item(), self.optimizer.metrics(), snapshot(self.optimizer)

    def steps(self):
        return [self.step(number) for number in range(1, 10)]


WAYS = {
    "8 bits": {},
    "32 bits": {"optim_bits": 32},
    "bfloat16": {"dtype": torch.bfloat16, "stochastic_rounding_params": True},
    "float64, states on the host": {"dtype": torch.float64, "state_device": "cpu"},
    "closure": {"closure": True},
    "activations recomputed": {"checkpointing": "not reentrant"},
    "activations recomputed by a backward pass in the backward pass": {"checkpointing": "reentrant"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_are_those_of_arrays_alone_bit_for_bit(monkeypatch, way):
    # What a batch changes is the order of sums within its arrays; test_torch_batches holds that.
    monkeypatch.setattr(batches, "ARRAY_LIMIT", ALONE)
    ordinary, released = Run(released=False, **WAYS[way]), Run(released=True, **WAYS[way])
    for one, other in zip(ordinary.steps(), released.steps(), strict=True):
        assert one[0] == other[0]
        assert same(one[2], other[2])
        # These are sums over all arrays, here in the order in which gradients came.
        assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert ordinary.optimizer.metrics()["skipped_steps"] == 1
    assert ordinary.optimizer.param_groups[0]["lr_scale"] > 0
    backward(released.model, 10)
    assert all(p.grad is None for p in released.model.parameters())  # also what was added and unfrozen


def test_batches_change_only_the_order_of_sums():
    ordinary, released = (Run(released=released, optim_bits=32) for released in (False, True))
    start = [p.detach().clone() for group in ordinary.optimizer.param_groups for p in group["params"]]
    last, other = ordinary.steps()[-1][2], released.steps()[-1][2]
    for p, q, w in zip(last[0], other[0], [*start, *last[0][len(start) :]], strict=True):
        assert (p - q).norm() <= 1e-4 * (q - w).norm() or torch.equal(p, q)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_model_takes_the_same_steps(monkeypatch, backend):
    torch._dynamo.reset()
    monkeypatch.setattr(batches, "ARRAY_LIMIT", ALONE)
    runs = [Run(released=released) for released in (False, True)]
    for run in runs:
        run.model.forward = torch.compile(run.model.forward, backend=backend)
    one, other = ([run.step(number) for number in (1, 2)] for run in runs)
    assert same([step[2] for step in one], [step[2] for step in other])


def test_no_two_gradients_exist_at_once_and_votes_are_small():
    run = Run(released=True)
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    alive = []
    run.optimizer._on_update = lambda p, update: alive.append(sum(q.grad is not None for q in params))
    for number in (1, 2):
        run.step(number)
    assert set(alive) == {1}
    backward(run.model, 8)
    ballots = [ballot for call in run.optimizer._open_step.calls for ballot in call.votes]
    assert len(ballots) == len(params) - 1  # without the frozen bias
    for batch, vote, lr_mask in ballots:
        held = [x for x in (*vote, lr_mask) if isinstance(x, torch.Tensor)]
        rows = max(1, *batch.params[0].shape[:1]) if batch.params[0].ndim > 1 else 1
        assert all(x.untyped_storage().nbytes() <= 4 * rows for x in held)


@pytest.mark.parametrize("released", [False, True])
def test_replaced_states_are_freed_without_the_garbage_collector(released):
    run = Run(released)
    gc.disable()
    try:
        run.step(1)
        old = [weakref.ref(state["exp_avg"]) for state in run.optimizer.state.values()]
        backward(run.model, 2)
        run.optimizer.step()
        assert [ref() for ref in old] == [None] * len(old)
    finally:
        gc.enable()


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
    assert optimizer.param_groups[0]["step"] == 2


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


@pytest.mark.parametrize("way_out", ["step", "load"])
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
    if way_out == "step":
        optimizer.step()
    else:
        optimizer.load_state_dict(kept)
    (a.sum() + b.sum()).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == (2 if way_out == "step" else 1)


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
    optimizer.param_groups[0]["percentile_clipping"] = 50
    before = a.detach().clone()
    with pytest.raises(ValueError, match="group 0 has percentile_clipping = 50"):
        a.sum().backward()
    assert torch.equal(a, before)
    optimizer.param_groups[0]["percentile_clipping"] = 100
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


def test_the_trainer_takes_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "ARRAY_LIMIT", ALONE)

    def run(released, **changes):
        optimizer = optimizer_of(model := adapted_model())
        if released:
            release_gradients(optimizer)
        fields = {"max_grad_norm": 0.0} | changes
        return Trainer(model, arguments(tmp_path, **fields), train_dataset=tokens(), optimizers=(optimizer, None))

    assert same(snapshot(trained(run(True))), snapshot(trained(run(False))))
    with pytest.raises(RuntimeError, match="cannot be accumulated"), warnings.catch_warnings(action="ignore"):
        trained(run(True, gradient_accumulation_steps=2))
