"""Narrow arrays in PyTorch and JAX: the codes of the long statistic are equal, bit for bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from automagic_core import Config
from automagic_optax import scale_by_cameamp
from automagic_optax.cameamp.states import flat_fields, scatter_states
from automagic_torch import AutomagicCameAMP8bit
from automagic_torch.codec import quantized_tensor
from parity.rules import rounding_rule
from tests.oracle.settings import STAGES_OFF

pytestmark = [
    pytest.mark.compiled_quickly,
    pytest.mark.skipif(not quantized_tensor.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes"),
]
# Blocks that end with the statistic, that do not, and a convolution; one that is not narrow.
SHAPES = ((4, 512), (600, 8), (16, 8, 3, 3), (65, 66))
FIELDS: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 0, "min_8bit_size": 1024, "force_8bit": True, **STAGES_OFF}


@pytest.mark.parametrize("factored", ["second_moment", pytest.param("all", marks=pytest.mark.slow)])
def test_codes_of_the_long_statistic(factored: str) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = AutomagicCameAMP8bit(params, factored=factored, **FIELDS)
    tx = scale_by_cameamp(config=Config(factored=factored, **FIELDS), layout="torch", rule=rounding_rule("cpu"))
    state = tx.init(weights)
    # From the second step on a code that is its neighbour would change what the next one is rounded from.
    grads = [rng.standard_normal(shape).astype(np.float32) * 10 ** rng.uniform(-3, 0) for shape in SHAPES]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g, dtype=torch.float32)
    optimizer.step()
    _, state = jax.jit(tx.update)([jnp.asarray(g, jnp.float32) for g in grads], state, weights)
    long = {"exp_avg_sq_col": 0, "exp_avg_sq_row": 0}
    for p, array in zip(params, scatter_states(weights, state), strict=True):
        ours, theirs = optimizer.state[p], flat_fields(array)
        assert ours.keys() == theirs.keys()
        for name in ours:
            if ours[name].dtype == torch.uint8:
                np.testing.assert_array_equal(ours[name].numpy(), theirs[name], err_msg=name)
                long[name] = long.get(name, 0) + 1
            else:
                # Means of up to 600 numbers in another order, and their roots.
                np.testing.assert_allclose(ours[name].numpy(), theirs[name], rtol=2e-6, err_msg=name)
    assert long["exp_avg_sq_row"] == 1
    assert long["exp_avg_sq_col"] == 2
