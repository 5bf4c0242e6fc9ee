"""Accelerate's wrapper around this optimizer, with a LoRA model."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from automagic_torch import found_marks
from tests.torch_side.adapter_models import adapted_model, optimizer_of, tokens, trainable
from tests.torch_side.torch_helpers import parameters, run, same, set_gradients, snapshot

PARTS = 2
"""Micro-batches in a step."""


def forget_settings():
    """Accelerate keeps its settings in the process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    forget_settings()
    yield
    forget_settings()


class Run:
    def __init__(self, *, other_adapters=False, **fields):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
        torch.manual_seed(0)
        model = adapted_model(other_adapters=other_adapters)
        optimizer = optimizer_of(model, **fields)
        scheduler = get_linear_schedule_with_warmup(optimizer, 2, 10)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.model.train()

    def steps(self, numbers):
        table = torch.stack([row["input_ids"] for row in tokens()])
        for number in range(PARTS * numbers.start, PARTS * numbers.stop):
            ids = table[4 * number % 64 :][:4]
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(input_ids=ids, labels=ids).loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def snapshot(self):
        return snapshot(self.optimizer.optimizer)


@pytest.mark.parametrize("saved_at", [3, 7])  # the mask's warm-up has 6 steps
def test_a_loaded_run_is_the_undisturbed_one_bit_for_bit(tmp_path, saved_at):
    undisturbed = Run(percentile_clipping=90)
    assert isinstance(undisturbed.optimizer, AcceleratedOptimizer)
    assert isinstance(undisturbed.scheduler, AcceleratedScheduler)
    undisturbed.steps(range(saved_at))
    assert undisturbed.optimizer.param_groups[0]["automagic_step"] == saved_at  # one step for two micro-batches
    undisturbed.accelerator.save_state(tmp_path)
    undisturbed.steps(range(saved_at, 10))

    forget_settings()
    loaded = Run(other_adapters=True, lr=2e-5, warmup_steps=1)
    loaded.accelerator.load_state(tmp_path)
    loaded.steps(range(saved_at, 10))
    assert same(loaded.snapshot(), undisturbed.snapshot())
    assert loaded.scheduler.get_last_lr() == [0.0]
    state = loaded.optimizer.state[trainable(loaded.model)[0]]
    assert state["exp_avg"].dtype == torch.uint8
    assert len(found_marks(loaded.model)["lora"]) == 8
    assert not loaded.optimizer.step_was_skipped


def test_wrapping_and_the_modes_of_training_change_no_bit():
    optimizer = optimizer_of(adapted_model())
    run(optimizer, range(1, 3))
    before = snapshot(optimizer)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    wrapped.train()
    wrapped.eval()
    wrapped.zero_grad(set_to_none=False)
    assert wrapped.optimizer is optimizer
    assert same(snapshot(optimizer), before)
    assert same(wrapped.state_dict(), before[1])


# Both accelerate's and torch's scheduler watch `step` by replacing it.
@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")
def test_a_step_that_the_scaler_skips_is_seen_by_the_wrapper_and_the_scheduler():
    Accelerator(cpu=True)
    params = parameters([(8, 64)])
    optimizer = optimizer_of(torch.nn.ParameterList(params))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    scheduler = AcceleratedScheduler(LambdaLR(optimizer, lambda step: 0.5**step), wrapped)
    seen = []
    for step in range(1, 5):
        set_gradients(params, step)
        scaler.scale(torch.zeros(()))  # the scaler begins with its first loss
        params[0].grad.mul_(scaler.get_scale())
        if step == 2:
            params[0].grad[0, 0] = torch.inf
        wrapped.step()
        scheduler.step()
        seen.append((wrapped.step_was_skipped, optimizer.param_groups[0]["automagic_step"], scheduler.get_last_lr()[0]))
    assert seen == [(False, 1, 5e-4), (True, 1, 5e-4), (False, 2, 2.5e-4), (False, 3, 1.25e-4)]
    assert optimizer.state[params[0]]["skipped_steps"].item() == 0


def test_without_a_scaler_the_optimizer_skips_the_array_itself():
    params = parameters([(8, 64), (64, 8)])
    optimizer = optimizer_of(torch.nn.ParameterList(params))
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    set_gradients(params, 1)
    params[0].grad[0, 0] = torch.nan
    before = [p.detach().clone() for p in params]
    wrapped.step()
    assert not wrapped.step_was_skipped
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert [optimizer.state[p]["skipped_steps"].item() for p in params] == [1, 0]
