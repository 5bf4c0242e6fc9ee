"""`optax.MultiSteps` and `optax.tree.map_params`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from automagic_core.arrays.state_forms import SEARCH_SCALARS
from automagic_optax import (
    EncourageLowRankState,
    QuantizedArray,
    RowColumn,
    SuppressEdgesState,
    automagic_8bit,
    finish_warmup,
    memory_report,
)
from tests.optax_side.small import assert_nearly_same, assert_same_bits, find_state, grads, params
from tests.optax_side.stage_runs import states_of

pytestmark = pytest.mark.compiled_quickly
TX = automagic_8bit(1e-4, warmup_steps=3, weight_decay=0.1)


def mean(*trees: Any) -> Any:
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_multi_steps_is_one_step_on_the_mean_gradient(dtype: str) -> None:
    names = ("scale", "dense") if dtype == "float32" else ("scale",)

    def chosen(tree: Any) -> Any:
        return {name: jax.tree.map(lambda x: x.astype(dtype), tree[name]) for name in names}

    weights = chosen(params())
    # Quarters of gradients with few bits: their running mean is exact in any order.
    every = [jax.tree.map(lambda g: jnp.round(g * 8) / 8, chosen(grads(t))) for t in range(8)]
    several = optax.MultiSteps(TX, every_k_schedule=4, use_grad_mean=True)
    state, expected, plain_state = several.init(weights), weights, TX.init(weights)
    update, plain_update = jax.jit(several.update), jax.jit(TX.update)
    for t, gradient in enumerate(every):
        inner, before = state.inner_opt_state, weights
        updates, state = update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        if t % 4 < 3:
            assert not any(np.asarray(u, np.float32).any() for u in jax.tree.leaves(updates))
            assert_same_bits(state.inner_opt_state, inner)
            assert_same_bits(weights, before)
            continue
        group = [jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in every[t - 3 : t + 1]]
        averaged = jax.tree.map(lambda g: g.astype(dtype), mean(*group))
        updates, plain_state = plain_update(averaged, plain_state, expected)
        expected = optax.apply_updates(expected, updates)
        # The running mean is ((g₁ + g₂) / 2 · 2 + g₃) / 3 …: float32 rounding, in bfloat16 its own 2⁻⁸.
        assert_nearly_same(
            jax.tree.map(lambda w: w.astype(jnp.float32), weights),
            jax.tree.map(lambda w: w.astype(jnp.float32), expected),
            1e-6 if dtype == "float32" else 2**-7,
        )
        assert int(find_state(state.inner_opt_state).step) == (t + 1) // 4
    assert memory_report(state)["total_parameters"] == sum(w.size for w in jax.tree.leaves(weights))
    assert find_state(finish_warmup(state).inner_opt_state).walk is None


def test_map_params_visits_everything_shaped_like_parameters() -> None:
    tx = automagic_8bit(1e-4, torque_decay=0.5, factored="all", lr_mask_gain=0.2)
    state = tx.init(params())
    seen = []

    def visit(leaf: Any) -> Any:
        seen.append(leaf)
        return leaf

    def is_stored(x: Any) -> bool:
        return isinstance(x, (QuantizedArray, RowColumn)) or x is None

    mapped = optax.tree.map_params(tx, visit, state, is_leaf=is_stored)
    assert_same_bits(mapped, state)
    shared = ("step", *SEARCH_SCALARS, "learning_rate", "last_polarity")
    trees = [v for name, v in find_state(state)._asdict().items() if name not in shared]
    (edges,), (rank,) = (states_of(state, kind) for kind in (SuppressEdgesState, EncourageLowRankState))
    trees += [edges.age, edges.edge_history, rank.effective_rank]
    expected = [leaf for tree in trees for leaf in jax.tree.leaves(tree, is_leaf=is_stored)]
    assert len(trees) == 14
    # Four parameters in every tree; a parameter without a state counts as None.
    assert len(seen) == len(expected) == 14 * 4
    assert sum(isinstance(leaf, QuantizedArray) for leaf in seen) == 2  # the kernel's exp_avg and s
    assert sum(isinstance(leaf, RowColumn) for leaf in seen) == 2 * 2


def test_map_params_turns_states_into_specs() -> None:
    spec, other = PartitionSpec("data"), PartitionSpec()
    state = TX.init(params())
    specs = optax.tree.map_params(
        TX,
        lambda leaf: jax.tree.map(lambda _: spec, leaf),
        state,
        transform_non_params=lambda _: other,
        is_leaf=lambda x: isinstance(x, QuantizedArray),
    )
    cameamp = find_state(specs)
    kernel = cameamp.exp_avg["dense"]["kernel"]
    assert isinstance(kernel, QuantizedArray)
    assert kernel.codes == kernel.absmax == spec
    assert (kernel.signed, kernel.block_size) == (True, 256)
    assert cameamp.step == cameamp.log_rate_scale == other
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"embedding": lambda path, leaf: leaf.ndim == 2},
        {"weight_decay_mask": lambda tree: jax.tree.map(lambda w: w.ndim == 2, tree)},
        {"lora": {"dense": True, "table": False, "scale": False}, "embedding": {"dense": False, "table": True}},
        {"profile": "quality_optimized"},
    ],
)
def test_map_params_with_marks(arguments: dict[str, Any]) -> None:
    if isinstance(arguments.get("embedding"), dict):
        arguments = {**arguments, "embedding": {**arguments["embedding"], "scale": False}}
    tx = automagic_8bit(1e-4, **arguments)
    state = tx.init(params())
    doubled = optax.tree.map_params(tx, lambda x: x * 2, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    assert jax.tree.leaves(find_state(doubled).torque_mean) == [2.0] * 4
    assert int(find_state(doubled).step) == 0
