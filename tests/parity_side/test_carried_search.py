"""A run that changes its framework in the midst of its climb and back again, beside runs that stay."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from automagic_core.arrays.group_keys import group_key
from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import ScaleByCameampState, automagic_8bit, from_torch_state, to_torch_state
from automagic_optax.cameamp.find_states import parts_of
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
SHAPES = {"kernel": (24, 40), "bias": (40,), "gain": ()}
FIELDS: dict[str, Any] = {"warmup_steps": 20, "max_lr": 0.1, "straightness": 0.8, "optim_bits": 32, "layout": "flax"}
FIELDS |= {"weight_decay": 0.1, "edge_suppression": False, "frequency_penalty": 0.0, "lora_rank_penalty": False}
STEPS, TURNS = 15, (12, 13)


def gradient(t: int) -> dict[str, np.ndarray]:
    """Drifts under noise, and points the other way twice, which ends the climb."""
    noise, drift = np.random.default_rng([t, 7]), np.random.default_rng(1)
    found = {name: drift.standard_normal(shape) + noise.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: np.asarray(-g if t in TURNS else g, np.float32) for name, g in found.items()}


class TorchRun:
    """Steps in torch."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.params = {name: torch.nn.Parameter(torch.tensor(np.asarray(w))) for name, w in weights.items()}
        self.optimizer = AutomagicCameAMP8bit(self.params.items(), lr=1e-3, **FIELDS)

    def train(self, steps: range) -> None:
        for t in steps:
            for name, g in gradient(t).items():
                self.params[name].grad = torch.tensor(g)
            self.optimizer.step()

    def search(self) -> list[float]:
        (group,) = self.optimizer.param_groups
        return [float(group[group_key(name)]) for name in SEARCH_SCALARS]

    def to_jax(self) -> JaxRun:
        run = JaxRun({name: p.detach().numpy() for name, p in self.params.items()})
        run.state = from_torch_state(self.optimizer.state_dict(), run.params)
        return run


class JaxRun:
    """Steps in JAX."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.params = {name: jnp.array(w) for name, w in weights.items()}
        tx = automagic_8bit(1e-3, **FIELDS)
        self.update, self.state = jax.jit(tx.update), tx.init(self.params)

    def train(self, steps: range) -> None:
        for t in steps:
            updates, self.state = self.update(gradient(t), self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)

    def search(self) -> list[float]:
        (state,) = parts_of(self.state, ScaleByCameampState)
        return [float(getattr(state, name)) for name in SEARCH_SCALARS]

    def to_torch(self) -> TorchRun:
        run = TorchRun(self.params)
        run.optimizer.load_state_dict(to_torch_state(self.state, self.params, run.optimizer.state_dict()))
        return run


def test_the_search_goes_on_in_the_other_framework_and_back() -> None:
    weights = gradient(100)
    in_torch, in_jax = TorchRun(weights), JaxRun(weights)
    for run in (in_torch, in_jax):
        run.train(range(4))
    first = in_torch.to_jax()
    assert first.search() == in_torch.search()
    first.train(range(4, 8))
    second = first.to_torch()
    in_the_climb = second.search()
    assert in_the_climb == first.search()
    second.train(range(8, STEPS))
    for run in (in_torch, in_jax):
        run.train(range(4, STEPS))
    assert in_the_climb[3] > 0.2
    assert second.search()[3] < 0
    # More steps up, of which the turn takes two back, and after it a rise.
    assert second.search()[0] > in_the_climb[0] + 0.1
    # 32 bits: float32 sums in another order, over fifteen steps.
    for run in (in_jax, second):
        np.testing.assert_allclose(run.search(), in_torch.search(), rtol=1e-5)
    for name, p in second.params.items():
        theirs = in_torch.optimizer.state[in_torch.params[name]]["walk"]
        ours = second.optimizer.state[p]["walk"]
        assert float(theirs.norm()) > 0
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
