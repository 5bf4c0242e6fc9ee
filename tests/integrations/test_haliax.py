"""`named_jit` of `init` and of steps over a mesh of eight devices, with an MLP; split as the parameters"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit, quantize_state
from tests.integrations.jax_runs import FIELDS, SAVED_AT, STEPS, assert_same_bits

hax = pytest.importorskip("haliax")
eqx = pytest.importorskip("equinox")
if jax.device_count() < 8:
    pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8", allow_module_level=True)

DISTRIBUTIONS = ("haliax",)

IN, HIDDEN, BATCH = hax.Axis("in", 64), hax.Axis("hidden", 256), hax.Axis("batch", 8)
AXES = {"in": "data", "hidden": "model"}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "automagic_8bit": lambda: automagic_8bit(1e-3, **FIELDS, edge_suppression=False, frequency_penalty=0),
    "quantize_state": lambda: quantize_state(optax.adamw(1e-3), min_8bit_size=64),
}


def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))


def create(seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "up": hax.random.normal(keys[0], (IN, HIDDEN)) * 0.1,
        "down": hax.random.normal(keys[1], (HIDDEN, IN)) * 0.1,
        "bias": hax.zeros(IN),
    }


def loss(params: Any, x: Any) -> jax.Array:
    hidden = hax.tanh(hax.dot(x, params["up"], axis=IN))
    return hax.mean((hax.dot(hidden, params["down"], axis=HIDDEN) + params["bias"] - x) ** 2).scalar()


def batch(step: int) -> Any:
    return hax.random.normal(jax.random.key(step), (BATCH, IN))


def named(function: Any) -> Any:
    return hax.named_jit(function, axis_resources=AXES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_undisturbed_one(name: str, tmp_path: Any) -> None:
    """The files are Equinox's, as haliax's users write them."""
    tx = OPTIMIZERS[name]()

    def begin(seed: int) -> tuple[Any, Any]:
        params = create(seed)
        return params, tx.init(params)

    def advance(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    with mesh():
        start, step = named(begin), named(advance)
        run = start(0)
        for number in range(STEPS):
            if number in SAVED_AT:
                eqx.tree_serialise_leaves(tmp_path / f"{number}.eqx", run)
            run = step(*run, batch(number))
        # Every state of a parameter's shape is split as the parameter; adamw says what that is.
        split = {x.shape: x.sharding.spec for x in jax.tree.leaves(run[0])}
        for leaf in jax.tree.leaves(run[1]):
            if leaf.shape in split and leaf.ndim == 2:
                assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh(), split[leaf.shape]), 2)
        for saved_at in SAVED_AT:
            resumed = eqx.tree_deserialise_leaves(tmp_path / f"{saved_at}.eqx", start(1))
            for number in range(saved_at, STEPS):
                resumed = step(*resumed, batch(number))
            assert_same_bits(resumed, run)
