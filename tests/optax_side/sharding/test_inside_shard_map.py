"""Inside `jax.shard_map`, where a value may differ from device to device, as in a step that shards its own states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from automagic_optax import (
    automagic_8bit,
    clip_by_percentile,
    encourage_low_rank,
    quantize_state,
    scale_by_cameamp,
    suppress_edges,
)

FIELDS: dict[str, Any] = {"min_8bit_size": 256, "warmup_steps": 20}
OURS = {
    "balanced": automagic_8bit(1e-4, profile="balanced", **FIELDS),
    "stages": automagic_8bit(
        1e-4, profile="quality_optimized", spatial_scope="all", percentile_clipping=60, lr_mask_gain=0.1, **FIELDS
    ),
    "adamw": quantize_state(optax.adamw(1e-3), min_8bit_size=256),
}
SHAPES = {"several": [(64, 64), (64,)], "batch": [(64, 64)] * 3, "chunks": [(1024, 512)]}


SLOW = [("balanced", "batch"), ("adamw", "several"), ("adamw", "chunks"), ("stages", "several"), ("stages", "batch")]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        *[("balanced", "several"), ("balanced", "chunks"), ("adamw", "batch")],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
    ],
)
@pytest.mark.parametrize("varying", ["gradients", pytest.param("all", marks=pytest.mark.slow)])
def test_steps_are_those_outside(name: str, shapes: str, varying: str) -> None:
    tx = OURS[name]
    rng = np.random.default_rng(0)
    params = {str(i): jnp.asarray(rng.normal(size=s), jnp.float32) for i, s in enumerate(SHAPES[shapes])}
    grads = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}

    def run(params: Any, grads: Any) -> Any:
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))  # a type varies over an axis of one device, too
    split, whole = PartitionSpec("d"), PartitionSpec()
    inside = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(split if varying == "all" else whole, split),
        out_specs=split,
    )
    found = jax.jit(inside)(params, grads)
    wanted = jax.jit(run)(params, grads)
    for key, x in wanted.items():
        # Chunks, and other programs, sum in another order; torque is steep near 0.
        np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-6)
        assert not np.array_equal(found[key], params[key])


def axes_of(tree: Any) -> list[Any]:
    return [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)]


ARRAYS = {"w": (64, 64), "lora_a": (64, 8), "b": (64,)}
KEPT = {
    "rate": scale_by_cameamp(1e-4),
    "norms": clip_by_percentile(60),
    "edges": suppress_edges(),
    "rank": encourage_low_rank(),
    "moments": OURS["balanced"],
    "32 bits": automagic_8bit(1e-4, optim_bits=32),
    "stages": OURS["stages"],
    "outside": quantize_state(OURS["balanced"], min_8bit_size=256),
}


@pytest.mark.parametrize("form", ["scan", "cond"])
@pytest.mark.parametrize("name", KEPT)
def test_a_state_keeps_the_axes_along_which_its_parameters_differ(name: str, form: str) -> None:
    tx = KEPT[name]
    arrays = {key: jnp.ones((1, *shape)) for key, shape in ARRAYS.items()}

    def run(params: Any) -> Any:
        params = grads = jax.tree.map(lambda x: x[0], params)
        begun = tx.init(params)

        def step(carried: Any, _: Any = None) -> Any:
            updates, state = tx.update(grads, carried[1], params)
            return (updates, state), None

        if form == "scan":
            (_, state), _ = jax.lax.scan(step, (grads, begun), None, 2)
        else:
            _, state = jax.lax.cond(grads["b"][0] > 0, lambda c: step(c)[0], lambda c: c, (grads, begun))
        assert axes_of(begun) == axes_of(state)
        return jax.tree.map(lambda x: x[None], state)

    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")), arrays)


def test_only_what_gradients_change_differs_where_parameters_do_not() -> None:
    tx = OURS["balanced"]

    def run(params: Any, grads: Any) -> Any:
        begun = tx.init(params)
        _, averaged = tx.update(jax.lax.pmean(grads, "d"), begun, params)
        assert {*axes_of(begun)} == {*axes_of(averaged)} == {frozenset()}
        return tx.update(grads, begun, params)[0]

    mesh, arrays = Mesh(np.array(jax.devices()[:1]), ("d",)), {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec("d")}
    jax.eval_shape(jax.shard_map(run, mesh=mesh, **specs), arrays, arrays)
