"""State bytes of a transformer of ten million parameters, counted from the arrays held after real steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit, finish_warmup, memory_report
from tests.optax_side.small import find_state

WIDTH, VOCABULARY, LAYERS = 512, 2000, 3  # in narrower layers, row and column statistics weigh more
Tree = dict[str, Any]


def transformer() -> Tree:
    """Embedding, blocks of attention and multilayer perceptron, biases and norms; the head is tied."""
    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    projection = {"kernel": (WIDTH, WIDTH)}
    block = {
        "norm1": norm,
        "attention": {"query": projection, "key": projection, "value": projection, "out": projection},
        "norm2": norm,
        "up": {"kernel": (WIDTH, 4 * WIDTH), "bias": (4 * WIDTH,)},
        "down": {"kernel": (4 * WIDTH, WIDTH), "bias": (WIDTH,)},
    }
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "positions": (100, WIDTH),
        "norm": norm,
        **{f"block{i}": block for i in range(LAYERS)},
    }
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def held_bytes(state: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(state))


BUDGETS = {"memory_optimized": 0.135, "balanced": 0.26, "quality_optimized": 0.39}


def is_embedding(path: Any, leaf: Any) -> bool:
    return "embedding" in str(path)


@pytest.mark.parametrize("profile", BUDGETS)
def test_share_of_the_states_that_a_step_would_leave(profile: str) -> None:
    params = transformer()
    adam = 8 * sum(leaf.size for leaf in jax.tree.leaves(params))
    tx = automagic_8bit(1e-5, profile=profile, warmup_steps=2, embedding=is_embedding)
    first = jax.eval_shape(tx.init, params)
    warming = first
    if profile == "balanced":
        _, warming = jax.eval_shape(tx.update, params, first, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), warming) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    share, share_warming = (
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / adam
        for state in (finish_warmup(warming), warming)
    )
    assert share <= BUDGETS[profile]
    # The warm-up holds a number for each row more.
    walk = 4 * sum(x.size for x in jax.tree.leaves(find_state(warming).walk)) / adam
    assert 0 < walk < 0.001
    assert share_warming == pytest.approx(share + walk)


@pytest.mark.slow  # as above, of the arrays that are held after real steps
@pytest.mark.parametrize(("profile", "budget"), BUDGETS.items())
def test_share_of_adams_state(profile: str, budget: float) -> None:
    params = transformer()
    leaves = jax.tree.leaves(params)
    elements = sum(leaf.size for leaf in leaves)
    assert elements >= 10_000_000
    assert len(leaves) >= 40
    adam = sum(leaf.nbytes for leaf in jax.tree.leaves(optax.scale_by_adam().init(params)) if leaf.ndim > 0)
    assert adam == 8 * elements

    tx = automagic_8bit(1e-5, profile=profile, warmup_steps=2, embedding=is_embedding)

    @jax.jit
    def step(params: Tree, state: Any) -> tuple[Tree, Any]:
        # The gradient of a quadratic that differs from element to element: real, and nearly free.
        grads = jax.tree.map(lambda w: jnp.sin(w * 1e3) * 1e-2 + w, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    first, state = params, tx.init(params)
    for t in range(4):
        params, state = step(params, state)
        if t == 0:
            warming = state
    assert int(find_state(state).step) == 4
    assert all(int(skipped) == 0 for skipped in jax.tree.leaves(find_state(state).skipped_steps))
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(first), strict=True))

    finished = finish_warmup(state)
    share, share_warming = held_bytes(finished) / adam, held_bytes(warming) / adam
    assert share <= budget
    # One sign bit for each element of 64 bits is 1.5625 points; the walk, a number for each row, is below 0.1.
    assert share < share_warming <= share + 0.016 + 0.001

    for held in (warming, finished):
        report = memory_report(held)
        assert report["total_parameters"] == elements
        assert report["adam_state_bytes"] == adam
        assert report["state_bytes"] == held_bytes(held)  # the report counts every array and nothing else
        assert report["state_bytes_per_parameter"] == pytest.approx(held_bytes(held) / elements)
        assert report["memory_saved_mb"] == pytest.approx((adam - held_bytes(held)) / 1e6)
        assert report["compression_ratio"] > 0.99
        eight = sum(leaf.size for leaf in leaves if leaf.size >= 1024)
        assert report["8bit_parameters"] == eight
