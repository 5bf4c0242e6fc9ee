"""A tiny language model with LoRA adapters, and tokens to train it on.  Nothing is downloaded: all is random."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from automagic_torch import AutomagicCameAMP8bit, mark_lora

FIELDS = {"lr": 1e-3, "max_lr": 1e-1, "warmup_steps": 6, "min_8bit_size": 64, "force_8bit": True, "torque_decay": 0.5}
"""8-bit states for every adapter; the warm-up ends within the runs of the tests."""


def adapted_model(dropout: float = 0.1, *, other_adapters: bool = False) -> nn.Module:
    """A model of two layers whose queries and values have adapters of rank 8, marked.

    Args:
        dropout: of the adapters.
        other_adapters: begins with other weights in the adapters; the rest is always the same.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    adapters = peft.LoraConfig(r=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM(config), adapters)
    assert len(mark_lora(model)) == 8
    if other_adapters:
        with torch.no_grad():
            for p in trainable(model):
                p.add_(torch.randn_like(p))
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_of(model: nn.Module, **fields: object) -> AutomagicCameAMP8bit:
    return AutomagicCameAMP8bit(trainable(model), **FIELDS | fields)


def tokens() -> list[dict[str, Tensor]]:
    """64 sequences of 12 tokens."""
    table = torch.randint(3, 32, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in table]
