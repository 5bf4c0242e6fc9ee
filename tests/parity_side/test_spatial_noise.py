"""Where the rows of d are constant, their variances are rounding, and the spatial factor must not read them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from automagic_optax import automagic_8bit
from automagic_torch import AutomagicCameAMP8bit
from tests.oracle.cameamp import CameampOracle

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"lr": 1e-3, "optim_bits": 32, "search_gain": 0.0, "warmup_steps": 0}


def of_torch(layout: str, w: np.ndarray, gradients: list[np.ndarray], **fields: Any) -> list[np.ndarray]:
    turned = np.transpose if layout == "flax" else np.asarray
    p = torch.nn.Parameter(torch.tensor(turned(w).copy()))
    optimizer = AutomagicCameAMP8bit([p], layout=layout, compiled=False, **FIELDS, **fields)
    updates = []
    for g in gradients:
        before, p.grad = p.detach().clone(), torch.tensor(turned(g).copy())
        optimizer.step()
        updates.append(turned((p.detach() - before).numpy()))
    return updates


def of_jax(layout: str, w: np.ndarray, gradients: list[np.ndarray], **fields: Any) -> list[np.ndarray]:
    turned = jnp.transpose if layout == "flax" else jnp.asarray
    tx, params = automagic_8bit(layout=layout, **FIELDS, **fields), turned(w)
    state, updates = tx.init(params), []
    for g in gradients:
        update, state = tx.update(turned(g), state, params)
        params = params + update
        updates.append(np.asarray(turned(update)))
    return updates


@pytest.mark.parametrize("factored", ["second_moment", "none"])
def test_gradients_of_one_example(factored: str) -> None:
    rng = np.random.default_rng(0)
    w = (0.1 * rng.standard_normal((80, 96))).astype(np.float32)
    # Positive inputs: every row of u is 1 or −1 in the first step.
    rank_one = [np.outer(rng.standard_normal(80), rng.random(96) + 0.1).astype(np.float32) for _ in range(3)]
    oracle, now, expected = CameampOracle([w.shape], factored=factored, **FIELDS), w, []
    for g in rank_one:
        expected.append(oracle.step_([g], [now])[0])
        now = now + expected[-1]
    for run in (of_torch, of_jax):
        for layout in ("torch", "flax"):
            found = run(layout, w, rank_one, factored=factored)
            for t, (ours, theirs) in enumerate(zip(found, expected, strict=True), 1):
                distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
                assert distance <= 1e-5, (run.__name__, layout, t)
