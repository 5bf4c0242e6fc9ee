"""An infinite weight stays infinite in both frameworks, and its finite neighbours take the same step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from automagic_optax import automagic_8bit, round_to_parameters
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"weight_decay": 0.5, "warmup_steps": 2, "max_lr": 0.1, "optim_bits": 32}
WEIGHTS = np.array([[1.0, np.inf, -2.0], [-np.inf, 0.5, -0.0], [3.0, 1.0, 2.0]], np.float32)
GRADIENTS = np.array([[1.0, -1.0, 0.5], [0.2, 0.0, 1.0], [-1.0, 0.3, 0.1]], np.float32)
DTYPES = [
    *("float32", "bfloat16"),
    *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float16", "float64")),
]


def torch_steps(dtype: str, fields: dict[str, Any]) -> np.ndarray:
    p = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=getattr(torch, dtype)))
    optimizer = AutomagicCameAMP8bit([p], lr=1e-3, **fields)
    for _ in range(4):
        p.grad = torch.tensor(GRADIENTS, dtype=p.dtype)
        optimizer.step()
    return p.detach().double().numpy()


def jax_steps(dtype: str, fields: dict[str, Any], learning_rate: Any = 1e-3) -> np.ndarray:
    with jax.enable_x64(dtype == "float64"):
        tx = automagic_8bit(learning_rate, layout="torch", **fields)
        params = jnp.asarray(WEIGHTS, dtype)
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(jnp.asarray(GRADIENTS, dtype), state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params, np.float64)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_weight_decays_alike_in_both_frameworks(dtype: str, stochastic: bool) -> None:
    fields = FIELDS | {"stochastic_rounding_params": stochastic}
    ours, theirs = jax_steps(dtype, fields), torch_steps(dtype, fields)
    for found in (ours, theirs):
        np.testing.assert_array_equal(np.where(np.isinf(WEIGHTS), WEIGHTS, 0), np.where(np.isinf(found), found, 0))
        assert not np.isnan(found).any()
    finite = np.isfinite(WEIGHTS)
    assert not np.array_equal(ours[finite], WEIGHTS[finite])
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=1e-5 if dtype in ("float32", "float64") else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rate_of_zero_moves_no_weight(dtype: str) -> None:
    found = jax_steps(dtype, FIELDS, learning_rate=lambda step: 0.0)  # 0 · ∞
    np.testing.assert_array_equal(found, WEIGHTS)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_makes_no_nan_of_an_infinite_weight(dtype: str, stochastic: bool) -> None:
    tx = round_to_parameters(stochastic)
    params = jnp.asarray([np.inf, -np.inf, np.inf, -np.inf, 1.0], dtype)
    updates, _ = tx.update(jnp.asarray([1.0, np.inf, -np.inf, 0.0, 0.25], jnp.float32), tx.init(params), params)
    new = np.asarray(optax.apply_updates(params, updates), np.float32)
    np.testing.assert_array_equal(new, np.float32([np.inf, -np.inf, np.inf, -np.inf, 1.25]))
