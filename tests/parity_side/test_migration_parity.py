"""The same Adam moments and the same progressive run give the same states in PyTorch and in JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from automagic_core import Config
from automagic_optax import (
    automagic_8bit,
    from_adam_state,
    from_torch_state,
    progressive_quantization,
    requantized,
)
from automagic_optax.moving.filled_chain import own_stages
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from automagic_torch import AutomagicCameAMP8bit, ProgressiveQuantization, load_adam_state, load_requantized
from automagic_torch.codec import quantized_tensor as codec
from tests.optax_side.small import find_state

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 4, "max_lr": 0.1, "min_8bit_size": 4096, "frequency_penalty": 0.0}


def assert_states_agree(ours: Any, theirs: Any) -> None:
    """Floats up to rounding; codes but for few, which two float32 programs may round apart."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)  # type: ignore[operator]
    named = jax.tree_util.tree_leaves_with_path(ours)
    for (path, a), b in zip(named, jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8:
            # bitsandbytes' CPU kernel finds a neighbouring code now and then.
            assert (a != b).mean() < 0.01, path
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=jax.tree_util.keystr(path))


@pytest.mark.skipif(not codec.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes")
def test_both_read_adam_alike() -> None:
    rng = np.random.default_rng(0)
    shapes = {"weight": (64, 80), "conv": (8, 4, 3, 5), "bias": (6,)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    mu = {name: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    nu = {name: jnp.asarray(rng.random(shape), jnp.float32) for name, shape in shapes.items()}
    tensors = [(name, torch.nn.Parameter(torch.tensor(np.asarray(params[name])))) for name in params]
    adamw = torch.optim.AdamW(tensors, betas=(0.9, 0.95), eps=1e-6)
    saved = adamw.state_dict()
    for index, name in enumerate(params):
        moments = {"exp_avg": torch.tensor(np.asarray(mu[name])), "exp_avg_sq": torch.tensor(np.asarray(nu[name]))}
        saved["state"][index] = {"step": torch.tensor(11.0), **moments}
    optimizer = AutomagicCameAMP8bit(tensors, lr=1e-3, force_8bit=True, **FIELDS)
    load_adam_state(optimizer, saved, restart_warmup=False)
    ours = from_torch_state(optimizer.state_dict(), params)

    tx = automagic_8bit(1e-3, layout="torch", **FIELDS)
    adam = optax.ScaleByAdamState(jnp.asarray(11, jnp.int32), mu, nu)
    theirs, _ = from_adam_state(adam, params, tx, b2=0.95, eps=1e-6, config=Config(**FIELDS), restart_warmup=False)
    theirs_state = find_state(theirs)
    # PyTorch's optimizer drops what the warm-up needs once it is over.
    theirs_state = theirs_state._replace(s=None, walk=None)
    assert_states_agree(find_state(ours), theirs_state)
    assert_edges_agree(ours, theirs, ("conv",))


def assert_edges_agree(ours: Any, theirs: Any, having: Sequence[Any]) -> None:
    (a,), (b,) = (own_stages(state, SuppressEdgesState) for state in (ours, theirs))
    assert_states_agree(a.edge_history, b.edge_history)
    assert all(np.asarray(a.edge_history[key]).any() and a.age[key] == b.age[key] > 0 for key in having)


def test_both_begin_stage_2_in_mid_run_alike() -> None:
    fields = FIELDS | {"optim_bits": 32, "spatial_scope": "all"}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((8, 4, 3, 5), (12, 9), (6,))]
    without = AutomagicCameAMP8bit(weights, lr=1e-3, **fields, edge_suppression=False)
    for _ in range(3):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        without.step()
    params = [jnp.asarray(w.detach().numpy()) for w in weights]
    old = from_torch_state(without.state_dict(), params)
    optimizer = AutomagicCameAMP8bit(weights, lr=1e-3, **fields)
    load_requantized(optimizer, without.state_dict())
    tx = automagic_8bit(1e-3, layout="torch", **fields)
    theirs, told = requantized(old, params, tx, config=Config(**fields))
    assert told == ["edge_history is estimated from the second moments (0, 1)"]
    assert_edges_agree(from_torch_state(optimizer.state_dict(), params), theirs, (0, 1))


@pytest.mark.skipif(not codec.BITSANDBYTES_AVAILABLE, reason="8 bits need bitsandbytes")
def test_both_move_the_same_arrays_with_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((128, 80), (64, 80))]
    optimizer = AutomagicCameAMP8bit(weights, lr=1e-3, force_8bit=True, **{**FIELDS, "edge_suppression": False})
    quantization = ProgressiveQuantization(optimizer, 10)
    params = [jnp.asarray(w.detach().numpy()) for w in weights]
    moved = 0
    for t in range(1, 9):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        optimizer.step()
        before = from_torch_state(optimizer.state_dict(), params)
        quantization.step()
        if t in (2, 5):
            ours, theirs = from_torch_state(optimizer.state_dict(), params), progressive_quantization(before, t, 10)
            assert jax.tree.structure(before) != jax.tree.structure(ours)  # type: ignore[operator]
            assert_states_agree(find_state(ours), find_state(theirs))
            moved += 1
    assert moved == 2
