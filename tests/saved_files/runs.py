"""The runs whose files lie in this folder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import automagic_torch

SHAPES = {"kernel": (16, 64), "bias": (64,), "lora_a": (64, 16)}
FIELDS: dict[str, Any] = {
    "spatial_scope": "all",
    "warmup_steps": 10,
    "torque_decay": 0.9,
    "lr_mask_gain": 0.2,
    "percentile_clipping": 90,
    "min_8bit_size": 256,
    "max_lr": 0.1,
    # Defaults of then.
    "rank_penalty_strength": 0.01,
    "low_rank_emphasis": 1.2,
}


def jax_params() -> dict[str, Any]:
    """The parameters before the first step."""
    return {name: _numbers(shape, 0) for name, shape in SHAPES.items()}


def gradients(params: dict[str, Any], number: int) -> dict[str, Any]:
    """The gradients of one step."""
    return {name: _numbers(w.shape, number) for name, w in params.items()}


def torch_model() -> tuple[torch.nn.Module, automagic_torch.AutomagicCameAMP8bit]:
    """The same parameters as attributes of a module, and their optimizer."""
    model = torch.nn.Module()
    for name, value in jax_params().items():
        setattr(model, name, torch.nn.Parameter(torch.from_numpy(value)))
    model.lora_a._is_lora_layer = True
    return model, automagic_torch.AutomagicCameAMP8bit(
        model.named_parameters(), lr=1e-3, layout="flax", force_8bit=True, **FIELDS
    )


def _numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
