"""The callbacks for Trainer and Lightning: marks before training, the rate in force in the logs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from automagic_torch import AutomagicCameAMP8bit, integrations, release_gradients
from automagic_torch.arrays.marks import is_embedding, is_lora

FIELDS: dict[str, Any] = {"lr": 1e-3, "max_lr": 0.1, "warmup_steps": 4, "optim_bits": 32}


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.lora_A = nn.Linear(6, 2, bias=False)
        self.lora_B = nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"loss": (self.lora_B(self.lora_A(self.embedding(x))) - 1.0).square().mean()}


def marks(model: Adapted) -> list[bool]:
    return [is_embedding(model.embedding.weight), is_lora(model.lora_A.weight), is_lora(model.lora_B.weight)]


def test_a_callback_that_there_is_not() -> None:  # without the libraries: test_torch_groups
    with pytest.raises(AttributeError, match="no attribute 'KerasCallback'"):
        integrations.KerasCallback  # noqa: B018


@pytest.mark.parametrize("first", [False, True])
def test_the_trainer_logs_the_rate_and_marks(tmp_path: Any, first: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shown: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            shown.append(dict(logs))

    callback = integrations.TrainerRateCallback()
    model = Adapted()
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=4, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no"
        ),
        train_dataset=[{"x": torch.arange(3), "labels": torch.zeros(1)} for _ in range(32)],
        optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, FIELDS),
        callbacks=[Reporter()] if first else [Reporter(), callback],
    )
    if first:
        callback.put_first(trainer)
    assert marks(model) == [True, True, True]
    trainer.train()
    rate = trainer.optimizer.optimizer.get_avg_learning_rate()
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 4
    assert records[-1]["effective_lr"] == pytest.approx(rate)
    assert all(isinstance(record["effective_lr"], float) for record in records)
    assert ("effective_lr" in shown[0]) == first, "reporters in front of it see nothing"


def test_the_trainer_may_not_clip_released_gradients(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    model = Adapted()
    optimizer = AutomagicCameAMP8bit(model.parameters(), **FIELDS)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no"),
        train_dataset=[{"x": torch.arange(3), "labels": torch.zeros(1)} for _ in range(8)],
        optimizers=(optimizer, None),
        callbacks=[integrations.TrainerRateCallback()],
    )
    release_gradients(optimizer)
    with pytest.raises(ValueError, match=r"max_grad_norm = 1.0 would clip nothing"):
        trainer.train()
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    assert optimizer.state[model.lora_A.weight]["age"] == 1


def test_lightning_logs_the_rate_and_marks(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    seen: list[tuple[list[bool], float]] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Adapted()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.inner(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return AutomagicCameAMP8bit(self.parameters(), **FIELDS)

        def on_train_batch_start(self, *_: Any) -> None:
            seen.append((marks(self.inner), 0.0))

    module = Module()
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[integrations.LightningRateCallback()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.arange(12).reshape(4, 3) % 7))
    assert [found for found, _ in seen] == [[True, True, True]] * 3
    assert float(trainer.callback_metrics["effective_lr"]) == pytest.approx(
        module.optimizers().optimizer.get_learning_rates()[0]
    )
