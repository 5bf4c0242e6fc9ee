"""Hugging Face's Trainer with a LoRA model and this optimizer as it is."""

import shutil
import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from automagic_torch import AutomagicCameAMP8bit, found_marks
from tests.torch_side.adapter_models import FIELDS, adapted_model, optimizer_of, tokens, trainable
from tests.torch_side.torch_helpers import same, snapshot

STEPS = 10


def arguments(folder, **changes):
    fields = {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1} | changes
    return TrainingArguments(folder, max_steps=STEPS, use_cpu=True, report_to=[], disable_tqdm=True, **fields)


def trainer_of(folder, model=None, optimizer=None, scheduler=None, **changes):
    model = adapted_model() if model is None else model
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    return Trainer(model, arguments(folder, **changes), train_dataset=tokens(), optimizers=(optimizer, scheduler))


def trained(trainer, checkpoint=None):
    """The optimizer after the run."""
    with warnings.catch_warnings(action="ignore"):  # transformers' and peft's own, about their versions
        trainer.train(resume_from_checkpoint=checkpoint)
    optimizer = trainer.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def test_the_default_schedule_falls_to_zero_and_zero_is_no_step(tmp_path):
    model = adapted_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, model)
    optimizer = trained(trainer)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([FIELDS["lr"] * (1 - step / STEPS) for step in range(STEPS)])
    (group,) = optimizer.param_groups
    assert (group["automagic_step"], group["lr"], group["initial_lr"]) == (STEPS, 0.0, FIELDS["lr"])
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.uint8 for p in group["params"])
    assert len(found_marks(model)["lora"]) == 8
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}

    weights = [p.detach().clone() for p in group["params"]]
    for p in group["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert same(weights, [p.detach() for p in group["params"]])


WAYS = {
    "plain": {},
    "accumulation and checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "bfloat16 autocast, cosine": {"bf16": True, "lr_scheduler_type": "cosine", "warmup_steps": 2},
}


@pytest.mark.parametrize("way", ["plain", *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[1:])])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path, way):
    changes = WAYS[way] | {"save_strategy": "steps", "save_steps": 4}
    undisturbed = snapshot(trained(trainer_of(tmp_path, **changes)))
    for saved_at in (4, 8):  # the mask's warm-up has 6 steps
        # All that can come from the checkpoint must come from it.
        model = adapted_model(other_adapters=True)
        optimizer = optimizer_of(model, lr=2e-5, warmup_steps=1)
        trainer = trainer_of(tmp_path, model, optimizer, **changes)
        assert same(snapshot(trained(trainer, str(tmp_path / f"checkpoint-{saved_at}"))), undisturbed)

    forgetful = tmp_path / "checkpoint-4"
    (forgetful / "optimizer.pt").unlink()
    assert not same(snapshot(trained(trainer_of(tmp_path, **changes), str(forgetful)))[0], undisturbed[0])


@pytest.mark.slow
def test_a_scheduler_of_ones_own_is_resumed_too(tmp_path):
    def trainer():
        optimizer = optimizer_of(model := adapted_model())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return trainer_of(tmp_path, model, optimizer, scheduler, save_strategy="steps", save_steps=4)

    undisturbed = trained(trainer())
    assert undisturbed.param_groups[0]["lr"] == pytest.approx(FIELDS["lr"] * 0.9**STEPS)
    resumed = trained(trainer(), str(tmp_path / "checkpoint-4"))
    assert same(snapshot(resumed), snapshot(undisturbed))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_bit(tmp_path):
    def run(**changes):
        model, calls = adapted_model(), []

        def count(*_):
            calls.append(1)

        model.get_submodule("base_model.model.model.layers.0.self_attn").register_forward_pre_hook(count)
        return snapshot(trained(trainer_of(tmp_path, model, **changes))), len(calls)

    plain, once = run()
    checkpointed, twice = run(gradient_checkpointing=True)
    assert (once, twice) == (STEPS, 2 * STEPS)
    assert same(checkpointed, plain)


@pytest.mark.slow
def test_accumulated_gradients_are_one_step(tmp_path):
    def run(**changes):
        model = adapted_model(dropout=0.0)  # the masks would differ
        return trained(trainer_of(tmp_path, model, optimizer_of(model, optim_bits=32), **changes))

    whole = run()
    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert parts.param_groups[0]["automagic_step"] == whole.param_groups[0]["automagic_step"] == STEPS
    start = trainable(adapted_model(dropout=0.0))
    for p, q, w in zip(parts.param_groups[0]["params"], whole.param_groups[0]["params"], start, strict=True):
        # Only the order of float32 sums differs; measured 1.2e-6.
        assert (p - q).norm() < 1e-5 * (q - w).norm()


def test_the_trainer_makes_the_optimizer_itself(tmp_path):
    trainer = Trainer(
        adapted_model(),
        arguments(tmp_path, weight_decay=0.01),
        train_dataset=tokens(),
        optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, FIELDS),
    )
    optimizer = trained(trainer)
    assert isinstance(optimizer, AutomagicCameAMP8bit)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert [group["automagic_step"] for group in optimizer.param_groups] == [STEPS, 0], "the second is empty"


@pytest.mark.slow
def test_a_damaged_checkpoint_stops_the_trainer(tmp_path):
    trained(trainer_of(tmp_path, save_strategy="steps", save_steps=4))
    file = tmp_path / "checkpoint-4" / "optimizer.pt"
    state_dict = torch.load(file, weights_only=True)
    state_dict["state"][3]["exp_avg_absmax"].fill_(torch.nan)
    shutil.copytree(file.parent, tmp_path / "checkpoint-5")
    torch.save(state_dict, tmp_path / "checkpoint-5" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"exp_avg_absmax .* nan"):
        trained(trainer_of(tmp_path), str(tmp_path / "checkpoint-5"))
