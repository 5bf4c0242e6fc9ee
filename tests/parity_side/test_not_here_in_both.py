"""A keyword that is no field gets its answer in both frameworks, and through the libraries that hand keywords on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn

from automagic_core.config.not_here import INSTEAD
from automagic_optax import automagic_8bit
from automagic_torch import AutomagicCameAMP8bit, create_improved_8bit_optimizer

VALUE = 0.25


def peft_lora_plus(**keywords: Any) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    make = importlib.import_module("peft.optimizers").create_loraplus_optimizer
    return make(model, AutomagicCameAMP8bit, lr=1e-5, loraplus_lr_ratio=16, **keywords)


def injected(**keywords: Any) -> Any:
    tx = optax.inject_hyperparams(automagic_8bit)(1e-5, **keywords)
    return tx.init({"kernel": jnp.ones((2, 2))})


WAYS: dict[str, Callable[..., Any]] = {
    "torch": lambda **keywords: AutomagicCameAMP8bit([nn.Parameter(torch.ones(2))], **keywords),
    "torch, a profile": lambda **keywords: create_improved_8bit_optimizer(
        [nn.Parameter(torch.ones(2))], profile="memory_optimized", **keywords
    ),
    "optax": lambda **keywords: automagic_8bit(1e-5, **keywords),
    "optax, a mapping": lambda **keywords: automagic_8bit(1e-5, overrides=keywords),
    "PEFT's LoRA+": peft_lora_plus,
    "inject_hyperparams": injected,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_answer_comes_through(way: str) -> None:
    WAYS[way]()
    for name, instead in INSTEAD.items():
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
            WAYS[way](**{name: VALUE})
        assert str(error.value) == f"unknown field {name} = {VALUE}; {instead}"


def test_in_a_group_it_is_somebody_elses() -> None:
    """AdamW's groups have an `eps`; what it means there is nobody's business here."""
    p = nn.Parameter(torch.ones(8, 4))
    others = dict.fromkeys(INSTEAD, VALUE)
    groups = [{**group, **others} for group in torch.optim.AdamW([p], lr=1e-5).param_groups]
    for group in groups:
        del group["betas"]  # two numbers
    optimizer = AutomagicCameAMP8bit(groups)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()["param_groups"][0]
    assert {name: saved[name] for name in others} == others
