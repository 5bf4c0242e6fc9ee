"""`Trainer` makes the optimizer; accumulation, bfloat16; resumed from its checkpoint; a callback; schedules; float16"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from automagic_core.config.constants import SEARCH_START
from automagic_torch import AutomagicCameAMP8bit, mark_lora
from automagic_torch.arrays.marks import is_lora
from tests.integrations.torch_runs import FIELDS
from tests.torch_side.torch_helpers import same, snapshot

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from automagic_torch.integrations import TrainerRateCallback  # noqa: E402
from tests.torch_side.adapter_models import adapted_model, tokens  # noqa: E402

DISTRIBUTIONS = ("transformers", "accelerate")
STEPS = 8

WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    "bfloat16 autocast": {"bf16": True, "lr_scheduler_type": "cosine"},
    "warm-up, stable, decay": {
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 2},
    },
}


def train(folder: Path, checkpoint: Path | None = None, other: bool = False, **changes: Any) -> AutomagicCameAMP8bit:
    return trained(folder, checkpoint, other, **changes)[0]


def trained(
    folder: Path, checkpoint: Path | None = None, other: bool = False, callbacks: Any = (), **changes: Any
) -> tuple[AutomagicCameAMP8bit, list[dict[str, Any]]]:
    """The optimizer and the log after training; without callbacks adapters are marked by hand."""
    model = adapted_model(other_adapters=other)
    if not callbacks:
        mark_lora(model)
    fields = {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 3}
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=FIELDS["lr"], **fields | changes
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=tokens(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, dict(FIELDS)),
    )
    with warnings.catch_warnings(action="ignore"):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.state.log_history


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path, way: str) -> None:
    undisturbed = train(tmp_path, **WAYS[way])
    assert any(state["exp_avg"].dtype == torch.uint8 for state in undisturbed.state.values())
    for saved_at in (3, 6):
        resumed = train(tmp_path / "again", tmp_path / f"checkpoint-{saved_at}", other=True, **WAYS[way])
        assert same(snapshot(resumed), snapshot(undisturbed))


def test_the_callback_marks_logs_and_resumes(tmp_path: Path) -> None:
    def begin(checkpoint: Path | None = None) -> tuple[AutomagicCameAMP8bit, dict[int, float]]:
        found: list[float] = []
        hook = register_optimizer_step_post_hook(lambda o, *_: found.append(o.get_learning_rates()[0]))
        folder = tmp_path if checkpoint is None else tmp_path / "again"
        rate = TrainerRateCallback()
        optimizer, log = trained(folder, checkpoint, checkpoint is not None, [rate], logging_steps=1, **constant)
        hook.remove()
        logged = {record["step"]: record["effective_lr"] for record in log if "loss" in record}
        assert list(logged) == list(range(1, STEPS + 1)), "the checkpoint keeps the log before it"
        assert list(logged.values())[-len(found) :] == found
        assert all(is_lora(p) for group in optimizer.param_groups for p in group["params"])
        return optimizer, logged

    constant = {"lr_scheduler_type": "constant"}
    by_hand = train(tmp_path / "by hand", **constant)
    undisturbed, logged = begin()
    assert same(snapshot(undisturbed), snapshot(by_hand)), "marked before the first step"
    assert logged[1] == pytest.approx(SEARCH_START, rel=1e-6), "no schedule knows where the search begins"
    resumed, logged_again = begin(tmp_path / "checkpoint-3")
    assert same(snapshot(resumed), snapshot(undisturbed))
    assert logged_again == logged


@pytest.mark.parametrize("way", ["no argument", "trial", "bound"])
def test_models_that_the_trainer_makes_are_marked_before_a_checkpoint_is_loaded(tmp_path: Path, way: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, **sizes)
    fields = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}

    def made(trial: Any = None, config: Any = config) -> Any:
        return transformers.LlamaForCausalLM(config)

    # The Trainer looks at the arguments.
    model_init = {
        "no argument": lambda: made(),
        "trial": lambda trial: made(trial),
        "bound": partial(made, config=config),
    }

    def run(folder: Path, checkpoint: Path | None = None) -> AutomagicCameAMP8bit:
        trainer = transformers.Trainer(
            args=transformers.TrainingArguments(str(folder), **fields),
            model_init=model_init[way],
            train_dataset=tokens(),
            optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, FIELDS | {"stable_emb": True}),
        )
        TrainerRateCallback().put_first(trainer)
        with warnings.catch_warnings(action="ignore"):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return getattr(trainer.optimizer, "optimizer", trainer.optimizer)

    undisturbed = run(tmp_path)
    forms = {state["exp_avg"].dtype for state in undisturbed.state.values() if state["exp_avg"].shape == (32, 32)}
    assert forms == {torch.uint8, torch.float32}, "the embedding has 32 bits"
    assert same(snapshot(run(tmp_path / "again", tmp_path / "checkpoint-2")), snapshot(undisturbed))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_loop_with_autocast(precision: str) -> None:
    """And for float16 a loss scaled by a `GradScaler`: accelerate has float16 on accelerators alone."""
    model = adapted_model()
    mark_lora(model)
    optimizer = AutomagicCameAMP8bit([p for p in model.parameters() if p.requires_grad], **FIELDS)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    ids = torch.stack([row["input_ids"] for row in tokens()])[:8]
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


SCHEDULES = [
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
]  # fmt: skip


@pytest.mark.parametrize("gain", [0.0, 0.1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_that_of_adamw(name: str, gain: float) -> None:
    """`get_scheduler` changes the rate and nothing else."""
    further = {"cosine_with_min_lr": {"min_lr": 1e-5}, "cosine_warmup_with_min_lr": {"min_lr": 1e-5}}
    further |= {"warmup_stable_decay": {"num_decay_steps": 2}}
    weight = torch.nn.Parameter(torch.ones(8, 16))

    def begin(make: Any, **fields: Any) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = make([torch.nn.Parameter(weight.detach().clone())], lr=1e-3, **fields)
        arguments = {"num_warmup_steps": 2, "num_training_steps": STEPS}
        return optimizer, transformers.get_scheduler(
            name, optimizer, **arguments, scheduler_specific_kwargs=further.get(name)
        )

    reference, due = begin(torch.optim.AdamW)
    fields = {key: value for key, value in FIELDS.items() if key != "lr"} | {"search_gain": gain}
    ours, scheduler = begin(AutomagicCameAMP8bit, **fields)
    by_hand = AutomagicCameAMP8bit([torch.nn.Parameter(weight.detach().clone())], lr=1e-3, **fields)
    for step in range(STEPS):
        (rate,) = (group["lr"] for group in reference.param_groups)
        assert ours.param_groups[0]["lr"] == rate
        by_hand.param_groups[0]["lr"] = rate
        gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for optimizer in (reference, ours, by_hand):
            optimizer.param_groups[0]["params"][0].grad = gradient.clone()
            optimizer.step()
        due.step()
        scheduler.step()
    assert same(snapshot(ours)[0], snapshot(by_hand)[0])
    assert same(ours.state_dict()["state"], by_hand.state_dict()["state"])
