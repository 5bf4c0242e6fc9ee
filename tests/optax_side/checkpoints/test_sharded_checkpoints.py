"""Orbax checkpoints of states on a mesh: back onto the same, another and none."""

from __future__ import annotations

from pathlib import Path

import jax
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from automagic_optax import abstract_state, automagic_8bit, finish_warmup, quantize_state, restore
from tests.optax_side.sharding.test_sharded_update import case
from tests.optax_side.small import assert_same_bits, params, train

ocp = pytest.importorskip("orbax.checkpoint")


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_on_any_mesh(tmp_path: Path) -> None:
    found = case("checkpoints", str(tmp_path))
    assert found["same"]["same"]
    assert found["finished"] == {"as saved": True, "asked": True}
    for name in ("same", "other", "one"):
        assert found[name]["placed"], name
        # One step from the same state: only sums in another order.
        assert found[name]["equal"] >= 0.9999, name
        assert found[name]["farthest"] <= 1, name


def test_the_form_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    tx = automagic_8bit(1e-4, warmup_steps=2)
    weights, state = train(tx, 3)
    described = abstract_state(tx, params())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), described) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert all(isinstance(x.sharding, SingleDeviceSharding) for x in jax.tree.leaves(described))
    assert jax.tree.structure(abstract_state(tx, params(), finished=True)) == jax.tree.structure(finish_warmup(state))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "whole", state)
        saver.save(tmp_path / "finished", finish_warmup(state))
        saver.save(tmp_path / "weights", weights)
    assert_same_bits(restore(tmp_path / "whole", tx, weights), state)
    assert_same_bits(restore(tmp_path / "whole", tx, weights, finished=True), finish_warmup(state))
    assert_same_bits(restore(tmp_path / "finished", tx, weights), finish_warmup(state))
    with pytest.raises(ValueError, match="holds no ScaleByCameampState"):
        restore(tmp_path / "weights", tx, weights)
    for path in (tmp_path / "nowhere", "whole"):
        with pytest.raises(ValueError, match="no absolute path of a directory"):
            restore(path, tx, weights)


def test_each_state_has_its_own_form(tmp_path: Path) -> None:
    # One searches for its rate and one does not; the third has no array at all.
    labels = {"dense": "a", "table": "b", "scale": "b"}
    searching, fixed = automagic_8bit(1e-4, warmup_steps=9), automagic_8bit(1e-4, search_gain=0)
    tx = optax.partition({"a": searching, "b": fixed, "none": searching}, labels)
    weights, state = train(tx, 2)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "whole", state)
        saver.save(tmp_path / "finished", finish_warmup(state))
    assert_same_bits(restore(tmp_path / "whole", tx, weights), state)
    assert_same_bits(restore(tmp_path / "finished", tx, weights), finish_warmup(state))


def test_moments_of_another_transformation_in_8_bits(tmp_path: Path) -> None:
    tx = quantize_state(optax.adam(1e-3))
    weights, state = train(tx, 2)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
    assert_same_bits(restore(tmp_path / "state", tx, weights), state)
