"""Meshes with Explicit axes: the types of states and updates say how they are split, and no update changes them."""

from __future__ import annotations

from contextlib import nullcontext

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from automagic_optax import automagic_8bit, metrics, nearest_code, quantize_state, sharding_report, state_specs
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


def test_new_states_are_split_over_auto_axes_beside_explicit_ones() -> None:
    assert case("mixed axes") == []


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


def on_one_device(specs: dict[str, P], shape: tuple[int, ...] = (64, 512)) -> tuple[Mesh, dict[str, jax.Array]]:
    """Parameters on an Explicit mesh of one device, which types all the same."""
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    return mesh, {
        name: jax.device_put(rng.standard_normal(shape).astype(np.float32), NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")])
@pytest.mark.parametrize(("count", "shape"), [(4, (64, 512)), (1, (1024, 512))], ids=["batch", "chunks"])
def test_moments_on_a_mesh_of_one_device(spec: P, count: int, shape: tuple[int, ...]) -> None:
    mesh, params = on_one_device({str(i): spec for i in range(count)}, shape)
    tx = quantize_state(optax.adam(1e-3))
    with jax.set_mesh(mesh):
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
    same = jax.tree.map(lambda a, b: jax.typeof(a).sharding == b.sharding, (params, state), (updates, after))
    assert all(jax.tree.leaves(same)), same


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("count", [4, 2], ids=["batch", "one by one"])
def test_gradients_may_have_types_that_moments_lack(count: int, inside: bool) -> None:
    mesh, params = on_one_device({str(i): P("x") for i in range(count)})
    tx = quantize_state(optax.adam(1e-3))
    state = tx.init(jax.tree.map(np.asarray, params))
    with jax.set_mesh(mesh) if inside else nullcontext():
        updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert all(updates[name].sharding.spec == P("x", None) for name in params)


@pytest.mark.parametrize("tx", [automagic_8bit(1e-3, profile="balanced"), quantize_state(optax.adam(1e-3))])
def test_one_axis_may_be_manual_and_the_other_explicit(tx: optax.GradientTransformation) -> None:
    mesh, params = on_one_device({"w": P(None, "y")})
    grads = {"w": jax.device_put(params["w"][None], NamedSharding(mesh, P("x", None, "y")))}

    def step(grads: dict, state: object, params: dict) -> object:
        return tx.update({"w": jax.lax.pmean(grads["w"][0], "x")}, state, params)

    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        specs = {"in_specs": (P("x"), P(), P()), "out_specs": P()}
        found = jax.jit(jax.shard_map(step, mesh=mesh, axis_names={"x"}, **specs))(grads, state, params)
        wanted = jax.jit(tx.update)(params, state, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jax.typeof(a).sharding == jax.typeof(b).sharding
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1 if a.dtype == np.uint8 else 1e-6)


@pytest.mark.parametrize("inside", [False, True])
def test_what_takes_arrays_takes_types(inside: bool) -> None:
    mesh, params = on_one_device({"lora_a": P("x", "y"), "lora_b": P(None, "y")})
    tx = automagic_8bit(1e-3)
    plain = {name: np.asarray(x) for name, x in params.items()}
    y = np.clip(plain["lora_a"], -1, 1)
    wanted = metrics(tx.init(plain), params=plain), nearest_code(y, True)
    with jax.set_mesh(mesh) if inside else nullcontext():
        codes = nearest_code(jax.device_put(y, params["lora_a"].sharding), True)
        found = metrics(tx.init(params), params=params), codes
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert jax.typeof(codes).sharding.spec == P("x", "y")
    np.testing.assert_array_equal(codes, wanted[1])


def test_the_report_passes_over_what_the_state_does_not_hold() -> None:
    _, params = on_one_device({"a": P("x"), "b": P(None, "y")})
    ours, only_a = automagic_8bit(1e-3), {"a": True, "b": False}
    alone = sharding_report({"a": params["a"]}, ours.init({"a": params["a"]}))
    assert sharding_report(params, optax.masked(ours, only_a).init(params)) == alone
    parted = optax.partition({"ours": ours, "other": optax.sgd(1e-3)}, {"a": "ours", "b": "other"})
    assert sharding_report(params, parted.init(params)) == alone
