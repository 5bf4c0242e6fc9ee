"""Optimizers in PyTorch, made of a list of parameters."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.contestants import ONLY_CUDA, OURS, SEARCHING

Make = Callable[[list[Any]], Any]


def of_library(module: str, name: str, **arguments: Any) -> Make:
    """An optimizer of a library that may be missing."""
    return lambda params: getattr(import_module(module), name)(params, **{"lr": 1e-4, **arguments})


def ours(name: str, **fields: Any) -> Make:
    """An entry of `OURS`, in 8 bits on a CPU too; fields win over it."""
    warmup_steps = 100_000 if name in SEARCHING else 0
    given = {"lr": 1e-4, "force_8bit": True, "warmup_steps": warmup_steps, **OURS[name], **fields}
    return lambda params: AutomagicCameAMP8bit(params, **given)


_CAME = {"beta1": 0.9, "beta2": 0.999, "beta3": 0.9999, "relative_step": False}
_ADAM = {"beta1": 0.9, "beta2": 0.999, "factored": False, "relative_step": False, "scale_parameter": False}
PEERS: dict[str, Make] = {
    "AdamW fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
    "AdamW foreach": lambda params: torch.optim.AdamW(params, lr=1e-4, foreach=True),
    "bitsandbytes AdamW8bit": of_library("bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": of_library("torchao.optim", "AdamW8bit"),
    "adafactor8bit": of_library("adafactor8bit", "Adafactor8Bit"),
    "adafactor8bit as AdamW": of_library("adafactor8bit", "Adafactor8Bit", **_ADAM),
    "adafactor8bit as CAME": of_library("adafactor8bit", "Adafactor8Bit", **_CAME),
    "flashoptim FlashAdamW": of_library("flashoptim", "FlashAdamW", master_weight_bits=None),
    "CAME": of_library("came_pytorch", "CAME"),
    # Gradients are the same at every step: its estimate would grow until the parameters are infinite.
    "Prodigy": of_library("prodigyopt", "Prodigy", lr=1.0, growth_rate=1.0),
}
NOT_ON_A_CPU = {"flashoptim FlashAdamW": ONLY_CUDA}
