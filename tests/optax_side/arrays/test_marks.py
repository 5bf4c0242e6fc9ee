"""Adapters and embeddings are found, with the same answer in `init` and in `update`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from automagic_optax import EncourageLowRankState, automagic_8bit, found_marks, scale_by_cameamp
from automagic_optax.arrays.default_marks import default_marks
from automagic_optax.arrays.leaves import leaf_name, leaves_of
from automagic_optax.arrays.marks import resolve_mark
from tests.optax_side.small import find_state

pytestmark = pytest.mark.compiled_quickly
EMBED, LORA_A, LORA_B = "embed.embedding", "layers.0.lora.lora_a", "layers.0.lora.lora_b"


class Adapted(nnx.Module):
    """An embedding, a layer with an adapter, and an adapter under names that nobody knows."""

    def __init__(self, width: int = 4) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(6, width, rngs=rngs)
        self.layers = nnx.List([nnx.LoRALinear(width, width, lora_rank=2, rngs=rngs)])
        self.thin = nnx.LoRAParam(jnp.ones((width, 2)))
        self.wide = nnx.LoRAParam(jnp.ones((2, width)))
        self.gate = nnx.LoRAParam(jnp.ones(width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.layers[0](self.embed(tokens))
        return x + self.gate * (x @ self.thin @ self.wide)


def loss(model: Adapted) -> jax.Array:
    return (model(jnp.arange(6)) ** 2).mean()


def listening(heard: list[dict[str, list[str]]], **marks: Any) -> optax.GradientTransformation:
    """A transformation that takes down which marks it finds in `init` and in `update`."""

    def init(params: Any) -> optax.EmptyState:
        heard.append(found_marks(params, **marks))
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        heard.append(found_marks(params, **marks))
        return updates, state

    return optax.GradientTransformation(init, update)


def train_with_nnx(model: Adapted, tx: Any, wrt: Any, steps: int = 2) -> nnx.Optimizer:
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model: Adapted, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

    for _ in range(steps):
        step(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    ("wrt", "expected"),
    [
        pytest.param(nnx.Param, {LORA_A, LORA_B, "thin", "wide"}, marks=pytest.mark.slow),
        (nnx.LoRAParam, {LORA_A, LORA_B, "thin", "wide"}),
        pytest.param(nnx.PathContains("lora"), {LORA_A, LORA_B}, marks=pytest.mark.slow),
    ],
)
def test_nnx_optimizer_treats_lora_params_of_any_name_as_adapters(wrt: Any, expected: set[str]) -> None:
    # `init` is given Variables, `update` bare arrays: the types of `thin` and `wide` are gone there.
    optimizer = train_with_nnx(Adapted(), automagic_8bit(1e-4, frequency_penalty=0.0, warmup_steps=0), wrt)
    stages = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, EncourageLowRankState))
    (stage,) = [x for x in stages if isinstance(x, EncourageLowRankState)]
    ranks = {leaf_name(leaf.path): float(leaf.value) for leaf in leaves_of(stage.effective_rank)}
    assert ranks.keys() == expected
    assert all(rank >= 1 for rank in ranks.values() if rank)
    assert ranks[LORA_A] >= 1


@pytest.mark.parametrize(("wrt", "embedding"), [(nnx.Param, [EMBED]), (nnx.PathContains("lora"), [])])
def test_nnx_optimizer_finds_names_in_both_calls(wrt: Any, embedding: list[str]) -> None:
    heard: list[dict[str, list[str]]] = []
    train_with_nnx(Adapted(), listening(heard), wrt)
    assert len(heard) >= 2
    assert all(found["embedding"] == embedding for found in heard)
    assert all({LORA_A, LORA_B} <= set(found["lora"]) for found in heard)


def wrappers() -> dict[str, Callable[[Any], Any]]:
    def small(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.size < 20, tree)

    def labels(tree: Any) -> Any:
        return jax.tree.map(lambda x: "small" if x.size < 20 else "rest", tree)

    return {
        "masked": lambda tx: optax.masked(tx, small),
        "partition": lambda tx: optax.partition({"small": tx, "rest": optax.set_to_zero()}, labels),
        "chain": lambda tx: optax.chain(optax.masked(tx, small), optax.clip(1.0)),
    }


@pytest.mark.parametrize("name", wrappers())
def test_where_other_leaves_are_taken_out(name: str) -> None:
    heard: list[dict[str, list[str]]] = []
    train_with_nnx(Adapted(), wrappers()[name](listening(heard)), nnx.Param)
    # The table has 24 elements and is taken out; `init` sees the types of all adapters, which have 8.
    assert {"lora": [LORA_A, LORA_B, "thin", "wide"], "embedding": []} in heard
    assert all({LORA_A, LORA_B} <= set(found["lora"]) and not found["embedding"] for found in heard)

    heard.clear()
    params = {"wte": jnp.ones((9, 4)), "lora_a": jnp.ones((4, 2)), "wpe": jnp.ones((3, 4))}
    tx = wrappers()[name](listening(heard))
    jax.jit(tx.update)(params, jax.jit(tx.init)(params), params)
    assert heard
    assert all(found == {"lora": ["lora_a"], "embedding": ["wpe"]} for found in heard)


@pytest.mark.parametrize("form", ["tree of booleans", "predicate"])
@pytest.mark.parametrize("variables", [True, False])
def test_marks_by_hand_in_an_nnx_state(form: str, variables: bool) -> None:
    params = nnx.state(Adapted(), nnx.Param)
    tree = jax.tree.map(lambda x: x.shape == (4, 4), params)
    given = {
        "tree of booleans": tree if variables else nnx.to_pure_dict(tree),
        "predicate": lambda path, leaf: path[-1].key == "kernel",
    }[form]
    heard: list[dict[str, list[str]]] = []
    train_with_nnx(Adapted(), listening(heard, lora=given, embedding=given), nnx.Param)
    assert all(found == {"lora": ["layers.0.kernel"], "embedding": ["layers.0.kernel"]} for found in heard)


def test_a_mark_that_is_missing_is_named_without_the_variables_value() -> None:
    params = nnx.state(Adapted(), nnx.Param)
    for state in (params, nnx.as_pure(params)):
        with pytest.raises(ValueError, match=r"lora has no mark for gate;"):
            found_marks(state, lora={"embed": False, "layers": False, "thin": True, "wide": True})


def test_names_of_linen() -> None:
    class Lora(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            down = self.param("lora_a", flax.linen.initializers.normal(), (x.shape[-1], 2))
            boxed = flax.linen.with_partitioning(flax.linen.initializers.zeros_init(), (None, None))
            return x @ down @ self.param("lora_b", boxed, (2, 4), unbox=True)

    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            return flax.linen.Dense(3, name="embed")(Lora()(flax.linen.Embed(5, 4)(tokens)))

    params = Model().init(jax.random.key(0), jnp.arange(5))["params"]
    found = found_marks(params)
    assert found["embedding"] == ["Embed_0.embedding"]  # and not the Dense called embed
    assert [name.removesuffix(".value") for name in found["lora"]] == ["Lora_0.lora_a", "Lora_0.lora_b"]


NESTED: dict[str, Any] = {
    "wte": {"weight": (9, 4)},
    "h": [
        {"attn": {"lora_A": {"default": {"weight": (2, 4)}}, "lora_B": {"weight": (4, 2)}, "weight": (4, 4)}},
        {"attn": {"lora_magnitude_vector": {"default": {"weight": (4, 1)}}, "kernel_lora_a": (4, 2)}},
        {"conv": {"lora_A": {"weight": (2, 4, 3, 3)}, "hada_w1_a": (4, 2), "hada_t1": (2, 2)}},
    ],
    "wpe": {"modules_to_save": {"default": {"weight": (3, 4)}}, "original_module": {"weight": (3, 4)}},
    "embed_tokens": {"lora_embedding_A": {"default": (2, 9)}, "base_layer": {"weight": (9, 4)}, "bias": (4,)},
    "mlp": {"trainable_tokens_delta": {"default": (2, 4)}, "weight": (4, 4), "embedding_proj": {"weight": (4, 4)}},
    "shared": (4, 4),
}
FLAT: dict[str, Any] = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.q_proj.lora_A.weight": (2, 4),
    "lora_unet_down_blocks_0.lora_down.weight": (2, 4),
    "lora_unet_down_blocks_0.weight": (4, 4),
    "lora_unet_down_blocks_0.alpha": (),
    "decoder/embed_tokens/embedding": (9, 4),
    "shared.weight": (9, 4),
    "model.embed_tokens.norm.weight": (4, 4),
}


def test_names_of_trees_born_in_pytorch() -> None:
    def arrays(shapes: Any) -> Any:
        return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

    nested = found_marks(arrays(NESTED))
    assert nested == {
        "lora": [
            "embed_tokens.lora_embedding_A.default",
            "h.0.attn.lora_A.default.weight",
            "h.0.attn.lora_B.weight",
            "h.1.attn.kernel_lora_a",
            "h.2.conv.hada_w1_a",
        ],
        "embedding": [
            "embed_tokens.base_layer.weight",
            "mlp.trainable_tokens_delta.default",
            "wpe.modules_to_save.default.weight",
            "wpe.original_module.weight",
            "wte.weight",
        ],
    }
    flat = found_marks(arrays(FLAT))
    assert flat["lora"] == ["lora_unet_down_blocks_0.lora_down.weight", "model.layers.0.q_proj.lora_A.weight"]
    assert flat["embedding"] == ["decoder/embed_tokens/embedding", "model.embed_tokens.weight", "shared.weight"]


@pytest.mark.parametrize(("shape", "expected"), [((4,), False), ((4, 2), True), ((3, 4, 2), False)])
def test_only_arrays_of_two_axes_are_marked(shape: tuple[int, ...], expected: bool) -> None:
    params = {"lora_a": jnp.ones(shape), "embedding": nnx.LoRAParam(jnp.ones(shape))}
    assert default_marks(params, "lora") == [expected, expected]
    assert default_marks(params, "embedding") == [expected, False]


def test_only_these_two_have_a_default_rule() -> None:
    params = {"wte": jnp.ones((9, 4))}
    assert resolve_mark(None, params, "weight_decay_mask", default=True) == [True]
    with pytest.raises(ValueError, match=r"'weight_decay_mask'.*valid: 'lora', 'embedding'"):
        default_marks(params, "weight_decay_mask")


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("make", [automagic_8bit, scale_by_cameamp])
def test_a_mask_that_was_called_as_a_schedule_is_refused(make: Any, jit: bool) -> None:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}

    def decayed(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    words = r"weight_decay_mask is a single value: optax\.inject_.* static_args=\('weight_decay_mask',\)"
    for mask in (decayed, lambda tree: jax.tree.map(lambda x: jnp.array(x.ndim > 1), tree)):
        tx = optax.inject_hyperparams(make)(1e-4, weight_decay=0.5, weight_decay_mask=mask)
        with pytest.raises(ValueError, match=words):
            (jax.jit(tx.init) if jit else tx.init)(params)

    tx = optax.inject_hyperparams(make, static_args="weight_decay_mask")(
        1e-4, weight_decay=0.5, weight_decay_mask=decayed
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = (jax.jit(tx.update) if jit else tx.update)(zeros, tx.init(params), params)[0]
    assert (updates["kernel"] < 0).all()
    assert not updates["bias"].any()


def test_one_boolean_holds_for_every_leaf() -> None:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    for mark in (True, np.bool_(True), np.array(True)):
        assert resolve_mark(mark, params, "embedding") == [True, True]
    with pytest.raises(ValueError, match="lora is a single value"):
        resolve_mark(jnp.array(True), params, "lora")
    for tx in (
        automagic_8bit(1e-4, weight_decay_mask=False, lora=False, embedding=True),
        optax.inject_hyperparams(automagic_8bit)(1e-4, lora=False, embedding=True),
        automagic_8bit(jnp.float32(1e-4), weight_decay_mask=lambda tree: True),
    ):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_an_embedding_that_was_found_has_its_rows_on_axis_0() -> None:
    params = {"embed": {"embedding": jnp.ones((64, 8))}, "head": {"kernel": jnp.ones((64, 8))}}
    fields: dict[str, Any] = {"min_8bit_size": 1, "stable_emb": True, "max_lr": 1e-2}
    for layout, kernel_rows in (("flax", (1, 8)), ("torch", (64, 1))):
        tx = automagic_8bit(1e-3, layout=layout, **fields)
        own = find_state(tx.init(params))
        assert own.walk["embed"]["embedding"].shape == (64, 1)
        assert own.walk["head"]["kernel"].shape == kernel_rows
        assert own.exp_avg["embed"]["embedding"].dtype == jnp.float32  # stable_emb
        assert not isinstance(own.exp_avg["head"]["kernel"], jax.Array)
        jax.eval_shape(tx.update, params, tx.init(params), params)  # `update` finds it too, else shapes do not fit
    none = automagic_8bit(1e-3, embedding=lambda path, leaf: False, **fields).init(params)
    assert find_state(none).walk["embed"]["embedding"].shape == (1, 8)
