"""Meshes with Explicit axes: the types of states and updates say how they are split, and no update changes them."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from automagic_optax import automagic_8bit, quantize_state, state_specs
from automagic_optax.arrays.alike import alike
from tests.optax_side.sharding.test_sharded_update import MESHES, case
from tests.optax_side.small import find_state


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "way"), [MESHES[1], MESHES[4]])
def test_types_stay_with_every_stage_on(shape: tuple[int, ...], way: str) -> None:
    found = case("types", shape, way)
    assert found["types"]
    # Inside, the work is split as on a mesh with Auto axes.
    assert found["equal"] >= 0.9999
    assert found["farthest"] <= 1


@pytest.mark.slow
def test_types_of_one_layer() -> None:
    found = case("types of a layer")
    assert found["types"]
    assert found["same"]


def described(mesh: AbstractMesh, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, spec))


def test_the_types_of_new_states_without_any_device() -> None:
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {
        "kernel": described(mesh, (128, 1024), P("data", "model")),
        "cut": described(mesh, (64, 768), P(None, ("data", "model"))),
        "down": described(mesh, (1024, 8), P("data", "model")),
    }
    with jax.sharding.use_abstract_mesh(mesh):
        state = find_state(jax.eval_shape(automagic_8bit(1e-4).init, params))

    def specs(x: object) -> list[tuple]:
        return [tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(x)]

    assert specs(state.exp_avg["kernel"]) == [("data", "model"), ("data", "model")]
    assert specs(state.exp_avg_sq["kernel"]) == [(None, "model"), ("data", None)]
    assert specs(state.walk["kernel"]) == [(None, "model")]
    assert specs((state.walk_energy, state.agreement)) == [(), ()]
    # Three blocks over eight devices.
    assert specs(state.exp_avg["cut"]) == [(None, ("data", "model")), (None, None)]
    # Narrow: codes and absmax of the long statistic, as those of any 8-bit state, and the short statistic.
    assert specs(state.exp_avg_sq["cut"]) == [(None, ("data", "model")), (None, None), (None, None)]
    assert specs(state.exp_avg_res["cut"]) == [(None, None)]
    assert specs(state.exp_avg_sq["down"]) == [(None, "model"), ("data", None), ("data",)]
    assert specs(state.exp_avg_res["down"]) == [(None, "model")]
    # The same from specs alone, without a mesh.
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    found = find_state(state_specs(automagic_8bit(1e-4), shapes, {name: x.sharding.spec for name, x in params.items()}))
    assert [tuple(found.exp_avg["kernel"].codes), tuple(found.exp_avg_sq["kernel"].row)] == [
        ("data", "model"),
        (None, "model"),
    ]
    assert [tuple(spec) for spec in jax.tree.leaves(found.exp_avg_sq["down"])] == specs(state.exp_avg_sq["down"])


def test_arrays_split_differently_are_not_alike() -> None:
    explicit = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    auto = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    found = {}

    def look(tree: dict) -> dict:
        found["keys"] = dict(zip(sorted(tree), alike(tree, [tree[name] for name in sorted(tree)]), strict=True))
        return tree

    split = {"a": P("data"), "b": P(None, "model"), "c": P("data")}
    with jax.sharding.use_abstract_mesh(explicit):
        jax.eval_shape(look, {name: described(explicit, (8, 8), spec) for name, spec in split.items()})
    assert found["keys"]["a"] == found["keys"]["c"] != found["keys"]["b"]
    # Where types do not tell, names stand for it, without the layers' numbers.
    names = ["h.0.out", "h.11.out", "h.1.up", "w0", "w1"]
    with jax.sharding.use_abstract_mesh(auto):
        jax.eval_shape(look, {name: described(auto, (8, 8), P()) for name in names})
    keys = found["keys"]
    assert keys["h.0.out"] == keys["h.11.out"]
    assert len({keys[name] for name in names}) == 4


def test_types_of_moments_in_8_bits_stay() -> None:
    mesh = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params = {
        "kernel": described(mesh, (64, 1024), P("data", "model")),
        "rows": described(mesh, (72, 100), P("data", None)),  # blocks over the ends of rows, and cut between devices
        "conv": described(mesh, (3, 3, 16, 32), P(None, None, "model", "data")),
    }
    tx = quantize_state(optax.adam(1e-3))
    with jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    moments = state.inner_state[0].nu
    found = {name: (tuple(x.codes.sharding.spec), tuple(x.absmax.sharding.spec)) for name, x in moments.items()}
    assert found["kernel"] == (("data", "model"), ("data", "model"))
    assert found["rows"] == (("data", None), (None,))
    assert found["conv"][0] == (None, None, "model", "data")
    before = (moments, state.inner_state[0].mu, params)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, before, (*after.inner_state[0][:0:-1], updates))
    assert all(jax.tree.leaves(same)), same


def test_specs_for_another_mesh_than_the_one_that_is_set() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((64, 1024), np.float32)}
    larger = AbstractMesh((8, 16), ("data", "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        specs = state_specs(automagic_8bit(1e-4), params, {"kernel": P("data", "model")}, mesh=larger)
    # Four blocks over sixteen devices.
    assert [tuple(spec) for spec in jax.tree.leaves(find_state(specs).exp_avg["kernel"])] == [
        ("data", "model"),
        ("data", None),
    ]
