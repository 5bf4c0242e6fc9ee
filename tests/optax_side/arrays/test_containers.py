"""Parameters in containers: the same numbers, and states in containers only where what these say holds for them."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import meta
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from automagic_optax import (
    automagic_8bit,
    clip_by_percentile,
    encourage_low_rank,
    found_marks,
    from_adam_state,
    memory_report,
    quantize_state,
    requantized,
    round_to_parameters,
    suppress_edges,
    suppress_high_frequencies,
)
from automagic_optax.arrays.containers import content, held_like, is_container, pure
from automagic_optax.codec.quantized_array import QuantizedArray
from automagic_optax.moments.quantized_moment import QuantizedMoment
from tests.optax_side.small import assert_same_bits

pytestmark = pytest.mark.compiled_quickly


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Named:
    """An array with names for its axes, as in haliax; it looks like an array where its own array does."""

    array: Any
    axes: tuple[str, ...]

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["held"], meta_fields=["names", "kind"])
@dataclasses.dataclass(frozen=True)
class OwnBox(meta.AxisMetadata):
    """A box of somebody's own, whose array is not called `value`.

    Structures of two registered dataclasses with the same metadata are equal for JAX; then, where their hashes happen
    to be alike, jax.jit returns one class for the other.  `kind` tells it from `Named`.
    """

    held: Any
    names: tuple[str, ...]
    kind: str = "box"

    def unbox(self) -> Any:
        raise AssertionError("may constrain how the array is split")

    def replace_boxed(self, val: Any) -> Any:
        return dataclasses.replace(self, held=val)

    def add_axis(self, index: int, params: Any) -> Any:
        raise NotImplementedError

    def remove_axis(self, index: int, params: Any) -> Any:
        raise NotImplementedError


NAMES = {"kernel": ("embed", "mlp"), "bias": ("mlp",), "lora_a": ("embed", "rank"), "scale": ()}
SHAPES = {"kernel": (16, 256), "bias": (256,), "lora_a": (16, 256), "scale": ()}
"""Of two arrays that form a batch, and two that do not."""
CONTAINERS: dict[str, Callable[[Any, tuple[str, ...]], Any]] = {
    "Partitioned": nn.Partitioned,
    "LogicallyPartitioned": nn.LogicallyPartitioned,
    "own box": OwnBox,
    "NamedArray": Named,
    "Variable": lambda x, names: nnx.Param(x, names=names),
    "box in a Variable": lambda x, names: nnx.Param(nn.Partitioned(x, names)),
}
# Without the stages that take longest to compile and hold nothing that a container could change.
ON = {
    "edge_suppression": False,
    "frequency_penalty": 0.0,
    "lora_rank_penalty": False,
    "torque_decay": 0.9,
    "min_8bit_size": 1024,
    "percentile_clipping": 50,
    "warmup_steps": 2,
}
TRANSFORMATIONS = {
    "automagic_8bit": automagic_8bit(1e-3, **ON),
    "quantize_state": quantize_state(optax.adamw(1e-3), min_8bit_size=1024),
}
# Every container around the quick transformation; around the other one of each kind: a LogicallyPartitioned is a
# Partitioned, and an own box is found by the class that both have.
FIRST = ("Partitioned", "NamedArray", "Variable", "box in a Variable")
BOTH = pytest.mark.parametrize(
    ("name", "container"),
    [
        pytest.param(name, box, marks=() if name == "quantize_state" or box in FIRST else pytest.mark.slow)
        for name in TRANSFORMATIONS
        for box in CONTAINERS
    ],
)


def numbers(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def wrapped(tree: dict[str, Any], container: str) -> dict[str, Any]:
    return {name: CONTAINERS[container](x, NAMES[name]) for name, x in tree.items()}


@functools.cache
def bare_run(name: str) -> tuple[Any, Any]:
    return steps(TRANSFORMATIONS[name], numbers(0), lambda tree: tree)[:2]


def steps(tx: Any, weights: Any, wrap: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    first = state = tx.init(weights)
    for seed in (1, 2):
        updates, state = tx.update(wrap(numbers(seed)), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state, first


STAGES = {
    "clip": clip_by_percentile(50),
    "edges": suppress_edges(0.1, spatial_scope="all"),
    "frequencies": suppress_high_frequencies(0.1, spatial_scope="all"),
    "low rank": encourage_low_rank(0.1, lora=lambda path, leaf: leaf.ndim == 2),
    "rounding": round_to_parameters(),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("container", FIRST)
def test_a_stage_alone_leaves_containers_to_what_comes_after_it(stage: str, container: str) -> None:
    tx = optax.chain(STAGES[stage], optax.sgd(0.1))
    bare = tx.update(numbers(1), tx.init(numbers(0)), numbers(0))
    weights = wrapped(numbers(0), container)
    updates, state = tx.update(wrapped(numbers(1), container), tx.init(weights), weights)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    assert_same_bits((pure(updates), pure(state)), bare)


def test_jax_tells_registered_classes_apart() -> None:
    ours = QuantizedArray(0, 0, True, 256), QuantizedMoment(0, 0, True, 256)
    theirs = Named(0, ("mlp",)), OwnBox(0, ("mlp",))
    for one, other in (ours, theirs):
        assert jax.tree.structure(one) != jax.tree.structure(other)


def test_what_a_variable_holds_is_read_past_its_hooks() -> None:
    class Doubled(nnx.Param):
        def get_value(self, **options: Any) -> Any:
            return 2 * super().get_value(**options)

    x = jnp.arange(3.0)
    assert_same_bits([content(Doubled(x)), content(nnx.Param(x, ref=True))], [x, x])


@BOTH
def test_the_numbers_and_the_structure(name: str, container: str) -> None:
    def wrap(tree: Any) -> Any:
        return wrapped(tree, container)

    tx = TRANSFORMATIONS[name]
    weights, state, first = steps(tx, wrap(numbers(0)), wrap)
    assert_same_bits((pure(weights), pure(state)), bare_run(name))
    assert jax.tree.structure(state) == jax.tree.structure(first)
    assert memory_report(state, weights) == memory_report(bare_run(name)[1], numbers(0))

    # nnx.Optimizer shows bare arrays to `update`; files may hold bare states.  optax.adamw takes no such mixture.
    if name == "quantize_state":
        return
    _, bare = tx.update(numbers(3), pure(state), pure(weights))
    _, mixed = tx.update(wrap(numbers(3)), pure(state), weights)
    assert_same_bits(mixed, bare)
    _, boxed = tx.update(numbers(3), state, pure(weights))
    assert_same_bits(boxed, held_like(state, bare))
    assert jax.tree.structure(boxed) == jax.tree.structure(state)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_stands_in_a_container_has_the_shape_of_its_parameter(name: str, container: str) -> None:
    state = TRANSFORMATIONS[name].init(wrapped(numbers(0), container))
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_container)
    codes = 0
    for path, node in nodes:
        where = jax.tree_util.keystr(path)
        parameter = next((key for key in SHAPES if f"'{key}'" in where), None)
        codes += ".codes" in where
        assert is_container(node) == (parameter is not None and pure(node).shape == SHAPES[parameter]), where
        assert not (".absmax" in where and is_container(node)), where
    assert codes >= 2


@functools.cache
def bare_migration() -> Any:
    return migrated(numbers(0), numbers(1))


def migrated(weights: Any, gradient: Any) -> Any:
    _, adam = optax.scale_by_adam().update(gradient, optax.scale_by_adam().init(gradient))
    return from_adam_state(adam, weights, TRANSFORMATIONS["automagic_8bit"])[0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_migrated_state_is_as_init_makes_it(container: str) -> None:
    weights = wrapped(numbers(0), container)
    for adams in (wrapped(numbers(1), container), numbers(1)):  # Adam's state may have been kept bare
        state = migrated(weights, adams)
        assert_same_bits(pure(state), bare_migration())
        assert jax.tree.structure(state) == jax.tree.structure(TRANSFORMATIONS["automagic_8bit"].init(weights))
    fine = automagic_8bit(1e-3, **{**ON, "optim_bits": 32})
    finer, _ = requantized(state, weights, fine)
    assert jax.tree.structure(finer) == jax.tree.structure(fine.init(weights))


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim == 2, params)


@functools.cache
def outer_runs(name: str) -> list[tuple[Any, Any]]:
    """Transformations with masks and labels around one, and what they give on bare arrays."""

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda x: "train" if x.ndim == 2 else "freeze", params)

    tx = TRANSFORMATIONS[name]
    groups = {"train": tx, "freeze": optax.set_to_zero()}
    both = optax.masked(tx, matrices), optax.partition(groups, labels)
    return [(outer, steps(outer, numbers(0), lambda tree: tree)[:2]) for outer in both]


@BOTH
def test_masks_and_labels_empty_containers(name: str, container: str) -> None:
    for outer, bare in outer_runs(name):
        weights, state, first = steps(outer, wrapped(numbers(0), container), lambda tree: wrapped(tree, container))
        assert jax.tree.structure(state) == jax.tree.structure(first)
        assert_same_bits((pure(weights), pure(state)), bare)


def test_a_container_around_several_arrays() -> None:
    params = {"layer": nnx.Param({"a": jnp.ones((16, 256)), "b": jnp.ones(3)})}
    tx = TRANSFORMATIONS["automagic_8bit"]
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    bare = pure(params)
    assert_same_bits(pure(updates), tx.update(bare, tx.init(bare), bare)[0])


def test_haliax() -> None:
    hax = pytest.importorskip("haliax")
    axes = hax.Axis("embed", 16), hax.Axis("mlp", 256)
    weights = {"kernel": hax.ones(axes), "bias": hax.ones(axes[1:])}
    for name, inner in TRANSFORMATIONS.items():
        tx = optax.masked(inner, matrices)
        with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
            state = hax.named_jit(tx.init, axis_resources={"embed": "data"})(weights)
            updates, new = hax.named_jit(tx.update, axis_resources={"embed": "data"})(weights, state, weights)
        assert jax.tree.structure((updates, new)) == jax.tree.structure((weights, state)), name
        nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=hax.is_named_array)
        assert all(hax.is_named_array(x) for path, x in nodes if ".codes" in jax.tree_util.keystr(path))


@pytest.mark.parametrize("container", CONTAINERS)
def test_marks_and_names(container: str) -> None:
    weights = {
        "layer": wrapped(numbers(0), container),
        "embed": {"embedding": wrapped(numbers(0), container)["kernel"]},
    }
    assert found_marks(weights) == {"lora": ["layer.lora_a"], "embedding": ["embed.embedding"]}
    seen = []
    found_marks(weights, lora=lambda path, x: bool(seen.append((jax.tree_util.keystr(path), x.shape))))
    assert ("['layer']['kernel']", (16, 256)) in seen
    mask = {"layer": {"kernel": True, "bias": False, "lora_a": False, "scale": False}, "embed": True}
    updates = []
    for decay in (0.0, 1.0):
        tx = optax.chain(automagic_8bit(1e-3, weight_decay=decay, weight_decay_mask=mask), round_to_parameters())
        updates.append(pure(tx.update(weights, tx.init(weights), weights)[0]))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), *updates)
    assert changed == {"layer": mask["layer"], "embed": {"embedding": True}}


# In short, how libraries find the shardings of an optimizer state that they do not know.


def maxtext_specs(state: Any) -> Any:
    """An nnx Variable is split by the names it carries; what is no Variable, or has no names, is whole."""

    def one(x: Any) -> P:
        names = x.get_metadata().get("names") if isinstance(x, nnx.Variable) else None
        return P(*(MESH_AXES.get(name) for name in names or ()))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def eformer_specs(state: Any) -> Any:
    """The first rule that is found in a leaf's path; too many axes are cut off, axes that do not divide dropped."""
    rules = [(r"kernel", P("data", "model")), (r"bias", P("model")), (r"lora_a", P("data", None)), (r".*", P())]

    def one(path: Any, x: Any) -> P:
        place = "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)
        spec = next(spec for rule, spec in rules if re.search(rule, place))
        fits = (axis if axis is None or n % MESH.shape[axis] == 0 else None for axis, n in zip(spec, x.shape))  # noqa: B905
        return P(*fits)

    return jax.tree_util.tree_map_with_path(one, state)


def levanter_specs(state: Any) -> Any:
    """A named array is split by its axes' names; any other array is whole; what has no shape and dtype is no array."""

    def one(x: Any) -> P | None:
        if isinstance(x, Named):
            return P(*map(MESH_AXES.get, x.axes)) if hasattr(x, "shape") and hasattr(x, "dtype") else None
        return P() if hasattr(x, "shape") and hasattr(x, "dtype") else None

    specs = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Named))
    assert len(jax.tree.leaves(specs)) == len(jax.tree.leaves(state)), "its writer would leave arrays out"
    return specs


def linen_specs(state: Any) -> Any:
    return nn.logical_to_mesh(nn.get_partition_spec(state), list(MESH_AXES.items()))


SPLIT = SHAPES | {"lora_a": (512, 4)}
MESH = AbstractMesh((2, 4), ("data", "model"))
MESH_AXES = {"embed": "data", "mlp": "model", "rank": None}
WAYS = {
    "MaxText": ("Variable", maxtext_specs),
    "eformer": ("LogicallyPartitioned", eformer_specs),
    "Levanter": ("NamedArray", levanter_specs),
    "Linen": ("LogicallyPartitioned", linen_specs),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_specs_that_libraries_derive(name: str, way: str) -> None:
    container, specs_of = WAYS[way]
    state = jax.eval_shape(TRANSFORMATIONS[name].init, wrapped(numbers(0, SPLIT), container))
    specs = jax.tree.broadcast(specs_of(state), state, is_leaf=lambda x: isinstance(x, P))
    split: dict[Any, set[int]] = {}
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        strict=True,
    )
    for (path, x), spec in pairs:
        part = NamedSharding(MESH, spec).shard_shape(x.shape)  # raises what jit(out_shardings=...) raises
        if ".codes" in jax.tree_util.keystr(path):
            split.setdefault(x.shape, set()).add(math.prod(x.shape) // math.prod(part))
    assert [split.pop((16, 256)), split.pop((512, 4))] == [{8}, {2}], "codes are split as their parameter"
    # Codes of a long statistic are bare: a rule for their parameter's path may split them, names of its axes must not.
    ruled = way == "eformer"
    statistics = {(1, 256): {4 if ruled else 1}, (512, 1): {2 if ruled else 1}}
    assert split == ({} if name == "quantize_state" else statistics)
