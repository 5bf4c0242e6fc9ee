"""LoRA, DoRA, LoHa, LoKr and QLoRA from `get_peft_model`, all parameters given; resumed from peft's files; merged"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from automagic_torch import AutomagicCameAMP8bit, found_marks, mark_lora
from tests.integrations.torch_runs import backward, optimizer_for
from tests.torch_side.torch_helpers import same, snapshot, through_a_file

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

DISTRIBUTIONS = ("peft", "bitsandbytes")
STEPS = 8
TARGETS = ["0", "2"]

CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "LoRA, a trained bias and a whole layer": lambda: peft.LoraConfig(
        r=4, target_modules=["0"], bias="lora_only", modules_to_save=["2"]
    ),
    "rsLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, decompose_both=True, decompose_factor=4),
    "QLoRA": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
    "QLoRA, int8": lambda: peft.LoraConfig(r=4, target_modules=TARGETS),
}


def model_of(kind: str, other: bool = False) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    if kind.startswith("QLoRA"):
        quantized = nn.Sequential()
        for index, layer in enumerate(base):
            if isinstance(layer, nn.Linear):
                shape, weights = (layer.in_features, layer.out_features), layer.state_dict()
                layer = (
                    bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
                    if "int8" in kind
                    else bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
                )
                layer.load_state_dict(weights)
            quantized.add_module(str(index), layer)
        base = quantized.to("cpu")
        setattr(base, "is_loaded_in_8bit" if "int8" in kind else "is_loaded_in_4bit", True)  # as transformers says it
    model = peft.get_peft_model(base, CONFIGS[kind]())
    if other:
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
    return model


def begin(kind: str, other: bool = False, **fields: Any) -> tuple[nn.Module, AutomagicCameAMP8bit]:
    """All parameters are handed over, the frozen ones too, as `model.parameters()` does."""
    model = model_of(kind, other)
    mark_lora(model)
    return model, optimizer_for(model.named_parameters(), **fields)


def go_on(model: nn.Module, optimizer: AutomagicCameAMP8bit, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_trains_moves_and_nothing_else(kind: str) -> None:
    model, optimizer = begin(kind)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = {name for name in names if "lora_A" in name or "lora_B" in name}
    assert set(found_marks(model)["lora"]) >= adapters
    go_on(model, optimizer, range(STEPS))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == names


@pytest.mark.parametrize("saved_at", [3, 6])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_resumed_run_is_the_undisturbed_one(kind: str, saved_at: int, tmp_path: Path) -> None:
    model, optimizer = begin(kind)
    go_on(model, optimizer, range(saved_at))
    model.save_pretrained(tmp_path)
    saved = through_a_file(optimizer.state_dict())
    resumed_model, resumed = begin(kind, other=True, lr=2e-3, warmup_steps=1)
    peft.set_peft_model_state_dict(resumed_model, peft.load_peft_weights(tmp_path, device="cpu"))
    resumed.load_state_dict(saved)
    go_on(model, optimizer, range(saved_at, STEPS))
    go_on(resumed_model, resumed, range(saved_at, STEPS))
    assert same(snapshot(resumed), snapshot(optimizer))


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "QLoRA"])
def test_the_merged_model_is_the_trained_one(kind: str) -> None:
    """Merged into the frozen weights, the adapters give the model that was trained."""
    model, optimizer = begin(kind)
    go_on(model, optimizer, range(STEPS))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        trained = model(x)
        merged = model.merge_and_unload()(x)
    # Merging rounds: in float32 to 1e-6, in 4 bits to a code of the whole weight.
    bound = 0.2 if kind == "QLoRA" else 1e-5
    assert (merged - trained).abs().max() < bound * trained.abs().max()
