"""The blocks of docs/checkpoints.md that save and restore in JAX run, and what comes back is what was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from automagic_optax import automagic_8bit
from tests.whole.doc_blocks import blocks, run

pytestmark = pytest.mark.compiled_quickly
TX = automagic_8bit(1e-3, profile="balanced", warmup_steps=3, min_8bit_size=64)


def of_page(place: str, path: Path) -> str:
    return blocks("checkpoints.md")[place].replace("/absolute/path", str(path))


def same(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: assert_array_equal(jnp.asarray(x), jnp.asarray(y)), a, b)


def test_orbax(tmp_path: Path) -> None:
    params = {"kernel": jnp.ones((16, 32))}
    _, state = jax.jit(TX.update)(params, TX.init(params), params)
    same(run(of_page("JAX, python", tmp_path / "run"), opt_state=state, tx=TX, params=params)["opt_state"], state)


def test_nnx(tmp_path: Path) -> None:
    def pair(seed: int) -> tuple[nnx.Module, nnx.Optimizer]:
        model = nnx.Linear(16, 32, rngs=nnx.Rngs(seed))
        return model, nnx.Optimizer(model, TX, wrt=nnx.Param)

    def step(model: nnx.Linear, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(jnp.ones((4, 16))) ** 2).sum())(model))

    trained, new = pair(0), pair(1)
    step(*trained)
    save, restore = of_page("JAX, python 2", tmp_path / "run").split("\n\nstate = ")
    names = run(of_page("JAX, python", tmp_path / "other"), opt_state=TX.init(jnp.ones(3)), tx=TX, params=jnp.ones(3))
    names = run(save, model=trained[0], optimizer=trained[1], **names)
    names["checkpointer"].wait_until_finished()
    run(f"state = {restore}", **names | {"model": new[0], "optimizer": new[1]})
    for found in (trained, new):
        step(*found)
    same(nnx.to_pure_dict(nnx.state(new)), nnx.to_pure_dict(nnx.state(trained)))
