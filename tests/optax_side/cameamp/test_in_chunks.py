"""Large arrays, and batches, are computed chunk by chunk on a CPU: the result is that of the whole array."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import QuantizedArray, automagic_8bit, progressive_quantization
from automagic_optax.arrays import in_chunks
from automagic_optax.cameamp import array_step, batch_step

pytestmark = pytest.mark.compiled_quickly
SHAPES = {
    "kernel": (24, 64),
    "blocks over rows": (32, 40),
    "convolution": (2, 2, 16, 32),
    "vector": (1024,),
    "tokens": (64, 24),
    **{f"batch {i}": (8, 16) for i in range(8)},
}


FEW = {name: shape for name, shape in SHAPES.items() if name not in ("convolution", "vector", "tokens")}
"""For `make test`: the program of each array is compiled twice."""
ROWS = {"factored": "second_moment", "stable_emb": False, "lr_mask_gain": 0.3}
PLAIN = {"factored": "none", "optim_bits": 32, "background_regularization": False}


def run(layout: Any, fields: dict[str, Any], dtype: Any, shapes: dict[str, tuple[int, ...]], steps: int = 4) -> Any:
    tx = automagic_8bit(
        1e-3, layout=layout, embedding=lambda path, leaf: "tokens" in str(path), warmup_steps=3, **fields
    )
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
    state = tx.init(params)

    @jax.jit
    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        grads = {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}
        if step == 1:
            grads["kernel"] = grads["kernel"].at[-1, -1].set(jnp.nan)
            grads["batch 3"] = grads["batch 3"].at[0, 0].set(jnp.inf)
            if "convolution" in shapes:
                grads["convolution"] = jnp.zeros_like(grads["convolution"])
        params, state = update(params, state, grads)
    return jax.device_get((params, state))


@pytest.mark.parametrize(
    ("layout", "fields", "dtype", "backend", "shapes"),
    [
        ("flax", ROWS, jnp.float32, "cpu", FEW),
        pytest.param("flax", ROWS, jnp.float32, "cpu", SHAPES, marks=pytest.mark.slow),
        pytest.param(
            *("torch", {"factored": "all", "torque_decay": 0.5}, jnp.bfloat16, "cpu", SHAPES), marks=pytest.mark.slow
        ),
        pytest.param("flax", PLAIN, jnp.float32, "cpu", SHAPES, marks=pytest.mark.slow),
        pytest.param("flax", {"factored": "second_moment"}, jnp.float32, "gpu", SHAPES, marks=pytest.mark.slow),
    ],
    ids=["few", "flax", "torch", "32 bits", "as on a GPU"],
)
def test_chunks_give_what_the_whole_array_gives(
    layout: Any,
    fields: dict[str, Any],
    dtype: Any,
    backend: str,
    shapes: dict[str, tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = {"min_8bit_size": 256, "block_size": 64, **fields}
    whole = run(layout, fields, dtype, shapes)
    taken: list[int] = []
    cut = in_chunks.in_chunks
    for module in (array_step, batch_step):
        monkeypatch.setattr(module, "in_chunks", lambda f, count, *rest: taken.append(count) or cut(f, count, *rest))
    monkeypatch.setattr(in_chunks, "CHUNK", 512)
    monkeypatch.setattr(in_chunks, "SMALLEST_CHUNK", 64)
    monkeypatch.setattr(in_chunks, "GPU_CHUNK", 512)
    monkeypatch.setattr(in_chunks, "GPU_WHOLE", 1024)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    chunks = run(layout, fields, dtype, shapes)
    # On a GPU only what is larger than GPU_WHOLE.
    assert len(taken) >= (2 if backend == "gpu" else 5 if shapes is FEW else 9)
    assert min(taken) > 1
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(chunks), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == np.uint8:
            # A sum in another order changes a last bit, and that now and then a code by one.
            assert np.mean(a != b) <= 2e-3, path
        else:
            # `energy_removed` is one minus a quotient near one.  Torque is steep: near 0 it makes of a rounding up to a
            # hundred (section 5.4's 0.01).
            name = jax.tree_util.keystr(path)
            near = 1e-6 if "energy" in name else 1e-5 if ".s[" in name else 1e-7
            assert np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=1e-5, atol=near), (
                path,
                np.abs(np.asarray(a, np.float64) - b).max(),
            )


@pytest.mark.parametrize(
    "shape", [pytest.param((50, 100), id="no whole blocks"), pytest.param((54, 100), id="no chunks")]
)
def test_states_that_progressive_quantization_stored_are_cut_at_their_blocks(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"optim_bits": 32, "warmup_steps": 0, "edge_suppression": False, "frequency_penalty": 0.0}
    tx = automagic_8bit(1e-3, lora_rank_penalty=False, block_size=64, min_8bit_size=256, **fields)
    rng = np.random.default_rng(0)
    # Rows of very different sizes, so that the absmax of a neighbour would be far off.
    params, sized = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    grads = sized * 10.0 ** jnp.asarray(rng.uniform(-3, 0, (shape[0], 1)), jnp.float32)
    state = tx.update(grads, tx.init(params), params)[1]
    state = progressive_quantization(state, 100, 100, params=params)
    assert any(isinstance(x, QuantizedArray) for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "codes")))
    monkeypatch.setattr(in_chunks, "CHUNK", 512)
    monkeypatch.setattr(in_chunks, "SMALLEST_CHUNK", 64)
    whole = tx.update(grads, state, params)  # only compiled updates are cut
    compiled = jax.jit(tx.update)(grads, state, params)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(compiled), strict=True):
        assert a.shape == b.shape
        if a.dtype == np.uint8:
            assert np.mean(np.asarray(a != b)) <= 2e-3
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
