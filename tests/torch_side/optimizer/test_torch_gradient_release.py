"""Arrays are updated in the backward pass and their gradients freed, with the results of an ordinary step."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer

from automagic_torch import AutomagicCameAMP8bit, mark_embeddings, release_gradients
from automagic_torch.cameamp import batches
from tests.torch_side.adapter_models import adapted_model, optimizer_of, tokens
from tests.torch_side.optimizer.test_hf_trainer import arguments, trained
from tests.torch_side.stages.test_torch_stage_chain import stages
from tests.torch_side.torch_helpers import FIRST, SMALL, same, snapshot, through_a_file

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


def of_sums(metrics):
    """The metrics, with the quotients of two sums that the energies removed are 1 less than."""
    return {name: 1 - value if name.startswith("energy_removed") else value for name, value in metrics.items()}


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


# The others of their kind: states in 8 bits, half precision, activations recomputed.
SECOND = ("32 bits", "float64, states on the host", "activations recomputed")


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow if w in SECOND else ()) for w in WAYS])
def test_the_steps_are_those_of_arrays_alone_bit_for_bit(monkeypatch, way):
    # What a batch changes is the order of sums within its arrays; test_torch_batches holds that.
    monkeypatch.setattr(batches, "ARRAY_LIMIT", ALONE)
    ordinary, released = Run(released=False, **WAYS[way]), Run(released=True, **WAYS[way])
    for one, other in zip(ordinary.steps(), released.steps(), strict=True):
        assert one[0] == other[0]
        assert same(one[2], other[2])
        # These are sums over all arrays, here in the order in which gradients came.
        assert of_sums(one[1]) == pytest.approx(of_sums(other[1]), rel=1e-5)
    assert ordinary.optimizer.metrics()["skipped_steps"] == 1
    assert ordinary.optimizer.param_groups[0]["automagic_log_rate_scale"] > FIRST
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
    ballots = [ballot for call in run.optimizer._open_step.calls for ballot in call.ballots]
    assert len(ballots) == len(params) - 1  # without the frozen bias
    for batch, found, vote, lr_mask in ballots:
        held = [x for x in (*found, *vote, lr_mask) if isinstance(x, torch.Tensor)]
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
