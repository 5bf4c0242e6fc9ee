"""Both frameworks' dashboards: the same names, and the same values for the same weights and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from automagic_core import Config
from automagic_optax import automagic_8bit, metrics
from automagic_torch import AutomagicCameAMP8bit

pytestmark = pytest.mark.compiled_quickly
SHAPES = {
    "layer.kernel": (24, 65),  # the fewest columns that have spatial variances
    "layer.lora_A": (4, 65),
    "layer.lora_B": (24, 4),
    "bias": (6,),
}
FIELDS = {"warmup_steps": 5, "max_lr": 1e-1, "optim_bits": 32, "percentile_clipping": 40, "rank_penalty_strength": 0.1}
STEPS = 8


def gradients(step):
    rng = np.random.default_rng(step)
    grads = {name: (0.3 + rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}
    grads["layer.kernel"][1] = 0  # a row that does not vary has twice the rate of others
    if step == 3:
        grads["layer.kernel"][0, 0] = np.inf
    return grads


def test_the_same_names_and_values_after_every_step():
    rng = np.random.default_rng(99)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(w)) for name, w in start.items()}
    for name, p in theirs.items():
        p._is_lora_layer = "lora" in name
    optimizer = AutomagicCameAMP8bit(theirs.items(), lr=1e-3, **FIELDS)
    params = {name: jnp.asarray(w) for name, w in start.items()}
    tx = automagic_8bit(1e-3, layout="torch", **FIELDS)
    state, config, update = tx.init(params), Config(lr=1e-3, **FIELDS), jax.jit(tx.update)
    ranks_before = {}
    for step in range(1, STEPS + 1):
        for name, g in gradients(step).items():
            theirs[name].grad = torch.tensor(g)
        optimizer.step()
        updates, state = update({name: jnp.asarray(g) for name, g in gradients(step).items()}, state, params)
        params = optax.apply_updates(params, updates)

        expected, found = optimizer.metrics(), metrics(state, config=config, params=params)
        assert list(found) == list(expected)
        assert found["skipped_steps"] == expected["skipped_steps"] == (step >= 3)
        # Bytes differ by the scalars that only one side keeps: the stages' ages and shares.
        assert found.pop("state_bytes") == pytest.approx(expected.pop("state_bytes"), rel=0.2)
        for name, value in expected.items():
            # Single float32 sums and eigenvalues; eight steps carry them on.  A share is 1 − a quotient near 1.
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)

        seen = {name: v for name, v in metrics(state).items() if name.startswith("effective_rank/")}
        if ranks_before:
            assert seen == pytest.approx(ranks_before, rel=1e-4), "those of the parameters before the step"
        ranks_before = {name: v for name, v in expected.items() if name.startswith("effective_rank/")}
    assert expected["rate/max"] > 2 * expected["rate/min"] > 0
    assert set(ranks_before) == {"effective_rank/layer.lora_A", "effective_rank/layer.lora_B"}
