"""Masks and labels around every transformation of this package, in `nnx.Optimizer`, as in a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.transforms import selective_transform

from automagic_optax import (
    Config,
    automagic_8bit,
    clip_by_percentile,
    encourage_low_rank,
    quantize_state,
    round_to_parameters,
    scale_by_cameamp,
    suppress_edges,
    suppress_high_frequencies,
)
from tests.optax_side.small import assert_nearly_same, assert_same_bits

pytestmark = pytest.mark.compiled_quickly


def is_matrix(path: Any, x: Any) -> bool:
    return x.ndim == 2


SGD = optax.sgd(1e-2)
INNER = {
    "automagic_8bit": automagic_8bit(1e-3, min_8bit_size=64, torque_decay=0.9, percentile_clipping=50),
    "scale_by_cameamp": scale_by_cameamp(1e-3, config=Config(min_8bit_size=64)),
    "quantize_state": quantize_state(optax.adam(1e-3), min_8bit_size=64),
    "clip_by_percentile": optax.chain(clip_by_percentile(50), SGD),
    "suppress_edges": optax.chain(suppress_edges(), SGD),
    "suppress_high_frequencies": optax.chain(suppress_high_frequencies(), SGD),
    "encourage_low_rank": optax.chain(encourage_low_rank(lora=is_matrix), SGD),
    "round_to_parameters": optax.chain(SGD, round_to_parameters()),
}


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def vectors(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim == 1, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "train" if x.ndim > 1 else "freeze", params)


def with_frozen(tx: Any) -> dict[str, Any]:
    return {"train": tx, "freeze": optax.set_to_zero()}


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "masked": lambda tx: optax.masked(tx, matrices),
    "partition": lambda tx: optax.partition(with_frozen(tx), labels),
    "multi_transform": lambda tx: optax.multi_transform(with_frozen(tx), labels),
    "selective_transform": lambda tx: selective_transform(tx, freeze_mask=vectors),
    "inside quantize_state": lambda tx: quantize_state(optax.masked(tx, matrices), min_8bit_size=64),
}


class Model(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16)), jnp.float32)


def loss(model: Model) -> jax.Array:
    return (model(X) ** 2).mean()


def pure(model: Model) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def plain(inner: str, wrapper: str) -> Any:
    """Two steps in a plain loop on a dict of arrays."""
    tx, model = WRAPPERS[wrapper](INNER[inner]), Model()
    params = pure(model)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(nnx.to_pure_dict(nnx.grad(loss)(model)), state, params)
        params = optax.apply_updates(params, updates)
        template = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(template, params)
        nnx.update(model, template)
    return params


# In the quick half every wrapper is around `quantize_state`, and a stage and a rounding are in one of them.  The others
# deal with what a wrapper leaves out in the same way, and take longer to compile.
QUICK = {(inner, "masked") for inner in ("clip_by_percentile", "suppress_high_frequencies", "round_to_parameters")}
QUICK |= {("quantize_state", wrapper) for wrapper in WRAPPERS}


@pytest.mark.parametrize(
    ("inner", "wrapper"),
    [
        pytest.param(inner, wrapper, marks=() if (inner, wrapper) in QUICK else pytest.mark.slow)
        for inner in INNER
        for wrapper in WRAPPERS
    ],
)
def test_in_nnx_optimizer(inner: str, wrapper: str) -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, WRAPPERS[wrapper](INNER[inner]), wrt=nnx.Param)
    structure = jax.tree.structure(nnx.state(optimizer))
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
    assert jax.tree.structure(nnx.state(optimizer)) == structure
    assert_same_bits(pure(model), plain(inner, wrapper))
    frozen = pure(model)["first"]["bias"], pure(Model())["first"]["bias"]
    if wrapper not in ("masked", "inside quantize_state"):  # these pass on what they do not train
        assert_same_bits(*frozen)


@pytest.mark.parametrize(
    ("inner", "wrapper"),
    [("scale_by_cameamp", "partition"), ("quantize_state", "masked")],
)
@pytest.mark.slow
def test_under_the_transformations_of_nnx(inner: str, wrapper: str) -> None:
    def make() -> tuple[Model, nnx.Optimizer]:
        model = Model()
        return model, nnx.Optimizer(model, WRAPPERS[wrapper](INNER[inner]), wrt=nnx.Param)

    def step(model: Model, optimizer: nnx.Optimizer) -> jax.Array:
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    described = nnx.state(nnx.eval_shape(make))
    model, optimizer = nnx.jit(make)()
    types = jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state((model, optimizer)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), described) == types
    for _ in range(2):
        nnx.jit(step)(model, optimizer)
    # A compiled program rounds a last bit otherwise.
    assert_nearly_same(pure(model), plain(inner, wrapper), 1e-5)

    several = nnx.jit(nnx.vmap(lambda _: make(), axis_size=2))(jnp.arange(2))
    nnx.jit(nnx.vmap(step))(*several)
    nnx.jit(nnx.scan(step, in_axes=(0, 0), out_axes=0))(*several)  # one after the other
    for found in jax.tree.leaves(
        jax.tree.map(lambda a, b: jnp.abs(a - b).max(), pure(several[0]), plain(inner, wrapper))
    ):
        assert found < 1e-5


class Mask(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_pytree_with_keys_class
class CallableMask(Mask):
    """A tree of booleans that can be called, as a module of Equinox or penzai is."""

    def __call__(self, x: Any) -> Any:
        raise AssertionError("a tree is not to be called")

    def tree_flatten_with_keys(self) -> Any:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in self._fields), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> Any:
        return cls(*children)


@pytest.mark.parametrize("kind", [pytest.param(Mask, marks=pytest.mark.slow), CallableMask])
def test_trees_that_can_be_called(kind: Any) -> None:
    params = kind(jnp.ones((16, 64)), jnp.ones(16))
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    mask = kind(True, False)

    def after(tx: Any, params: Any = params, grads: Any = grads) -> Any:
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    every_mark = {"weight_decay_mask": mask, "embedding": kind(False, False), "lora": mask}
    found = after(automagic_8bit(1e-3, weight_decay=0.1, **every_mark))
    as_dicts = {name: mark._asdict() for name, mark in every_mark.items()}
    tx = automagic_8bit(1e-3, weight_decay=0.1, **as_dicts)
    assert_same_bits(found._asdict(), after(tx, params._asdict(), grads._asdict()))

    masked = after(optax.masked(automagic_8bit(1e-3, weight_decay=0.1), mask))
    assert_same_bits(masked.bias, grads.bias)
    assert (masked.kernel != grads.kernel).any()
    as_function = jax.tree_util.Partial(lambda _, params: mask, True)
    again = after(automagic_8bit(1e-3, weight_decay=0.1, **every_mark | {"weight_decay_mask": as_function}))
    assert_same_bits(again, found)
