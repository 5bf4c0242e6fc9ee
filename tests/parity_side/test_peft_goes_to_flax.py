"""The adapter that PEFT itself makes goes on in Flax under `peft_name`, and back."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from automagic_optax import from_torch_state, peft_name, to_torch_state
from automagic_optax.moving.neutral_state import flat_states
from automagic_torch import AutomagicCameAMP8bit, mark_lora


class Block(nn.Module):
    """One dense layer."""

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(12, 20)

    def forward(self, x):
        return self.c_attn(x)


class Tiny(nn.Module):
    """Blocks under the names that GPT-2 uses."""

    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Block()])

    def forward(self, x):
        return self.h[0](x)


@pytest.mark.slow  # imports PEFT
def test_the_adapter_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Tiny(), peft.LoraConfig(r=4, target_modules=["c_attn"]))
    mark_lora(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = AutomagicCameAMP8bit(trained, lr=1e-4, warmup_steps=10)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
    weights = {name.split(".")[-3]: jnp.array(p.detach().numpy().T) for name, p in trained}
    params = {"h": {"0": {"c_attn": {"lora_a": weights["lora_A"], "lora_b": weights["lora_B"]}}}}
    saved = optimizer.state_dict()
    carried = from_torch_state(saved, params, names=peft_name, layout="flax")
    for flat, index in zip(flat_states(carried, params), (0, 1), strict=True):
        theirs = saved["state"][index]
        np.testing.assert_array_equal(flat["exp_avg"], theirs["exp_avg"].T)
        np.testing.assert_array_equal(flat["exp_avg_sq_row"], theirs["exp_avg_sq_row"].T)
        assert flat["age"] == 3
    back = to_torch_state(carried, params, saved, names=peft_name, layout="flax")
    for index, states in saved["state"].items():
        for name, value in states.items():
            assert torch.equal(back["state"][index][name], value), name
    optimizer.load_state_dict(back)
