"""The optimizer's own stages move with it; stages that a user chained around it stay apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_core import Config
from automagic_core.arrays.bias import weight_seen
from automagic_core.config.constants import EDGE_DECAY
from automagic_optax import (
    automagic_8bit,
    clip_by_percentile,
    from_adam_state,
    load_state_file,
    requantized,
    save_state_file,
    scale_by_cameamp,
    suppress_edges,
)
from automagic_optax.moving.filled_chain import own_stages
from automagic_optax.moving.neutral_state import flat_states
from automagic_optax.stages.clip_by_percentile import ClipByPercentileState
from automagic_optax.stages.suppress_edges import SuppressEdgesState
from tests.optax_side.small import assert_same_bits, find_state

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 40, "optim_bits": 32, "frequency_penalty": 0.0, "lora_rank_penalty": False}
CONFIG = Config(lr=1e-3, **FIELDS)
PARAMS = {"conv": jnp.ones((3, 4, 5, 8)), "bias": jnp.zeros(8)}


def gradients(t: int) -> Any:
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda x: jnp.asarray((1 + t) * rng.standard_normal(x.shape), jnp.float32), PARAMS)


def after(tx: Any, steps: int, state: Any = None) -> Any:
    state = tx.init(PARAMS) if state is None else state
    for t in range(steps):
        _, state = tx.update(gradients(t), state, PARAMS)
    return state


def edges_of(state: Any) -> SuppressEdgesState:
    (edges,) = own_stages(state, SuppressEdgesState)
    return edges


@pytest.mark.parametrize("how", ["Adam", "requantized"])
def test_a_run_with_an_estimated_history_goes_on_the_same_from_a_file(tmp_path: Path, how: str) -> None:
    tx = automagic_8bit(1e-3, **FIELDS)
    if how == "Adam":
        state, told = from_adam_state(after(optax.adam(1e-3), 9), PARAMS, tx, config=CONFIG)
    else:
        old = after(automagic_8bit(1e-3, **FIELDS, edge_suppression=False), 9)
        state, told = requantized(old, PARAMS, tx, config=CONFIG)
    assert any(sentence.startswith("edge_history is estimated") for sentence in told)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    state = after(tx, 2, state)
    assert int(edges_of(state).age["conv"]) == int(find_state(state).age["conv"]) == 11
    save_state_file(tmp_path / "file", state, PARAMS, CONFIG)
    loaded = load_state_file(tmp_path / "file", PARAMS).opt_state
    assert_same_bits(tx.update(gradients(5), loaded, PARAMS)[0], tx.update(gradients(5), state, PARAMS)[0])


def test_a_history_with_another_age_is_written_as_the_array_would_have_it() -> None:
    tx = automagic_8bit(1e-3, **FIELDS)
    state = after(tx, 9)
    edges = edges_of(state)

    def written(age: int, history: Any) -> Any:
        other = edges._replace(age=edges.age | {"conv": jnp.int32(age)}, edge_history=edges.edge_history | history)
        whole = jax.tree.map(
            lambda x: other if x is edges else x, state, is_leaf=lambda x: isinstance(x, SuppressEdgesState)
        )
        return flat_states(whole, PARAMS)[1]["edge_history"]

    history = edges.edge_history["conv"]
    assert_same_bits(written(9, {}), history)
    expected = history * (weight_seen(EDGE_DECAY, 9) / weight_seen(EDGE_DECAY, 2))
    np.testing.assert_allclose(written(2, {}), expected, rtol=1e-6)
    without = after(automagic_8bit(1e-3, **FIELDS, edge_suppression=False), 9)
    state_of = find_state(state)
    estimate = edges_of(requantized((state_of, *without[2:]), PARAMS, tx, config=CONFIG)[0]).edge_history["conv"]
    np.testing.assert_allclose(written(0, {"conv": jnp.zeros_like(history)}), estimate, rtol=1e-6)


def test_a_history_stays_where_another_array_gets_one() -> None:
    params = {"conv": jnp.ones((3, 4, 5, 8)), "dense": jnp.ones((6, 7))}
    convolutions = automagic_8bit(1e-3, **FIELDS)
    _, state = convolutions.update(jax.tree.map(jnp.cos, params), convolutions.init(params), params)
    new, told = requantized(state, params, automagic_8bit(1e-3, **FIELDS, spatial_scope="all"), config=CONFIG)
    assert "edge_history is estimated from the second moments (dense)" in told
    assert_same_bits(edges_of(new).edge_history["conv"], edges_of(state).edge_history["conv"])


def test_stages_of_one_class_keep_their_places(tmp_path: Path) -> None:
    fields = FIELDS | {"percentile_clipping": 50}
    config, own = Config(lr=1e-3, **fields), automagic_8bit(1e-3, **fields)
    whole = optax.chain(clip_by_percentile(5), suppress_edges(0.2), own, clip_by_percentile(7))
    state = after(whole, 4)
    same, told = requantized(state, PARAMS, whole, config=config)
    assert told == []
    assert_same_bits(same, state)
    inner, told = requantized(state, PARAMS, own, config=config)
    assert_same_bits(inner, state[2])
    assert {sentence.split()[0] for sentence in told if "tx has no such stage" in sentence} == {
        "ClipByPercentileState",
        "SuppressEdgesState",
    }
    # The one that is left could be either: it begins anew.
    fewer = optax.chain(clip_by_percentile(5), own)
    shorter, told = requantized(state, PARAMS, fewer, config=config)
    assert "ClipByPercentileState begins anew" in told
    assert_same_bits(shorter, (fewer.init(PARAMS)[0], state[2]))
    for chained in (state, state[2]):
        save_state_file(tmp_path / "file", chained, PARAMS, config)
        loaded = load_state_file(tmp_path / "file", PARAMS).opt_state
        for kind, names in ((ClipByPercentileState, ("norm_history",)), (SuppressEdgesState, ("edge_history",))):
            (ours,), (theirs,) = (own_stages(x, kind) for x in (loaded, state[2]))
            assert_same_bits([getattr(ours, name) for name in names], [getattr(theirs, name) for name in names])


def test_a_stage_around_an_optimizer_without_it_is_not_saved(tmp_path: Path) -> None:
    tx = optax.chain(clip_by_percentile(5), suppress_edges(0.1), automagic_8bit(1e-3, **FIELDS, edge_suppression=False))
    state = after(tx, 2)
    save_state_file(tmp_path / "file", state, PARAMS, Config(lr=1e-3, **FIELDS, edge_suppression=False))
    assert_same_bits(
        find_state(load_state_file(tmp_path / "file", PARAMS).opt_state).exp_avg, find_state(state).exp_avg
    )


def test_a_chain_made_by_hand_has_one_of_each_stage() -> None:
    def chain(*before: Any) -> Any:
        return optax.chain(*before, scale_by_cameamp(config=CONFIG), suppress_edges(0.1))

    nested = optax.chain(suppress_edges(0.1), optax.chain(scale_by_cameamp(config=CONFIG), optax.scale(1.0)))
    for tx in (chain(suppress_edges(0.1)), nested):
        assert "edge_history" in flat_states(after(tx, 2), PARAMS)[1]
    assert "edge_history" not in flat_states(after(chain(), 2), PARAMS)[1]
    with pytest.raises(ValueError, match="opt_state has 2 SuppressEdgesState before ScaleByCameampState; only one"):
        flat_states(after(chain(suppress_edges(0.1), suppress_edges(0.2)), 2), PARAMS)
