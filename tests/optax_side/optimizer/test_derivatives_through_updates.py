"""Derivatives through updates, against finite differences."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_core import decay
from automagic_optax import automagic_8bit
from automagic_optax.cameamp import equations
from automagic_optax.codec.stored import Statistics
from automagic_optax.stages.encourage_low_rank import _encouraged

pytestmark = pytest.mark.compiled_quickly
FIELDS: dict[str, Any] = {"warmup_steps": 4, "optim_bits": 32, "max_lr": 1.0}
SHAPES = {"conv": (3, 4, 2, 8), "lora_a": (8, 4), "bias": (5,)}


def tree(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def loss(params: dict[str, jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.cosh(0.5 * (params[name] - w))) for name, w in tree(1).items()), start=jnp.zeros([]))


@pytest.mark.parametrize(
    "fields",
    [
        # With the search the first rates are 1e-5, whatever the one asked for.
        pytest.param(
            {"percentile_clipping": 50, "torque_decay": 0.9, "rank_penalty_strength": 0.2, "search_gain": 0.0},
            marks=pytest.mark.slow,
        ),
        pytest.param({"profile": "memory_optimized", "search_gain": 0.0}, marks=pytest.mark.slow),
        pytest.param({"factored": "none", "search_gain": 0.0}, marks=pytest.mark.slow),
    ],
    ids=["everything", "memory_optimized", "elementwise"],
)
def test_of_the_rate_and_of_the_first_parameters(fields: dict[str, Any]) -> None:
    def after(lr: Any, params: Any) -> jax.Array:
        tx = automagic_8bit(lr, **FIELDS, **fields)

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
        return loss(params)

    value = jax.jit(after)
    # No element near its goal: there a first update jumps from one sign to the other, which no derivative knows.
    start = jax.tree.map(lambda w: w + 3 * jnp.sign(w), tree(0))
    by_lr, by_params = jax.jit(jax.grad(after, argnums=(0, 1)))(0.05, start)
    # A loss of some 100 in float32 with steps of a hundredth: its digits leave a thousandth.
    slope = (value(0.05 + 5e-4, start) - value(0.05 - 5e-4, start)) / 1e-3
    assert by_lr == pytest.approx(float(slope), rel=5e-3)
    way = tree(2)
    ends = [value(0.05, jax.tree.map(lambda w, d, sign=sign: w + sign * 1e-2 * d, start, way)) for sign in (1, -1)]
    along = sum(float(jnp.vdot(by_params[name], way[name])) for name in way)
    assert along == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=1e-2)


@pytest.mark.parametrize(
    "factored",
    [pytest.param("none", marks=pytest.mark.slow), "second_moment", pytest.param("all", marks=pytest.mark.slow)],
)
def test_where_gradients_are_zero_or_tiny(factored: str) -> None:
    # Without search and votes no array knows of the other.
    alone: dict[str, Any] = {"search_gain": 0.0, "lr_mask_gain": 0.0, "profile": "memory_optimized"}

    def after(way: Any, sizes: dict[str, float]) -> dict[str, jax.Array]:
        tx = automagic_8bit(
            way[0], weight_decay=0.1, factored=factored, background_regularization=True, **FIELDS, **alone
        )

        def step(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            # Each step has a mixture of its own: a scale alone would change nothing.
            g = {name: size * (tree(1)[name] + t * way[1] * tree(2)[name]) for name, size in sizes.items()}
            # Gradients of 0 have a slope here, as those of LoRA's A at the first step.
            g = {name: x + (sizes[name] == 0) * (way[1] - 0.7) for name, x in g.items()}
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {name: tree(0)[name] for name in sizes}
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(3.0))
        return jax.tree.map(lambda w: jnp.sum(jnp.sin(w)), params)

    ways = [jax.jit(way(after)) for way in (jax.jacrev, jax.jacfwd)]

    def slopes(lora_a: float, bias: float) -> dict[str, Any]:
        found = [way((0.05, 0.7), {"lora_a": lora_a, "bias": bias}) for way in ways]
        backwards, forwards = ({name: np.array(x) for name, x in of.items()} for of in found)
        for name, values in backwards.items():
            np.testing.assert_allclose(values, forwards[name], rtol=1e-3, atol=1e-6)
        return backwards

    usual = slopes(1.0, 1.0)
    assert all(abs(x) > 1e-3 for values in usual.values() for x in values)
    for sizes in ({"bias": 0.0}, {"lora_a": 0.0}, {"lora_a": 0.0, "bias": 0.0}, {"lora_a": 1e-10, "bias": 1e-10}):
        for name, values in slopes(**{"lora_a": 1.0, "bias": 1.0, **sizes}).items():
            if sizes.get(name) == 0:
                assert np.isfinite(values[0])  # weight decay alone
                assert values[1] == 0
            else:  # neither their own size nor the other array counts
                np.testing.assert_allclose(values, usual[name], rtol=2e-3)


def test_of_a_row_of_zeros_beside_large_gradients() -> None:
    def root(g: jax.Array) -> jax.Array:
        q = jnp.square(g) + 1e-30
        factors = Statistics(jnp.mean(q, 1, keepdims=True), jnp.mean(q, 0, keepdims=True))
        return equations.root_of_factors(equations.root_factors(factors, decay(0.999), jnp.float32(1)))[1, 0]

    slope = jax.grad(root)(1e12 * jnp.array([[0.0, 0.0], [1.0, 2.0]]))
    assert jnp.isfinite(slope).all()
    assert slope[1, 0] > 0


def in_float64(W: np.ndarray, g: np.ndarray) -> np.ndarray:
    values, Q = np.linalg.eigh(W @ W.T)
    weak = 1 / (1 + (values / values.mean()) ** 2)
    T = (Q * (weak / np.sqrt(np.maximum(values, 0) + 0.01 * values.max()))) @ Q.T @ W
    return g + 0.2 * (Q * (1 - weak)) @ Q.T @ g + 0.1 * np.linalg.norm(g) / np.linalg.norm(T) * T


@pytest.mark.parametrize(
    "sigma",
    [
        [2, 2, 1, 1, 0.5, 0.5],
        pytest.param([1] * 6, marks=pytest.mark.slow),
        pytest.param([3, 2, 1, 1e-3, 1e-4, 0], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_of_the_low_rank_stage_where_singular_values_are_equal(sigma: list[float]) -> None:
    rng = np.random.default_rng(0)
    W = np.diag(sigma) @ np.linalg.qr(rng.standard_normal((10, 10)))[0][:6]
    g, dW, dg = rng.standard_normal((3, 6, 10))
    wanted = (in_float64(W + 1e-5 * dW, g + 1e-5 * dg) - in_float64(W - 1e-5 * dW, g - 1e-5 * dg)) / 2e-5
    primals, tangents = ([jnp.asarray(x, jnp.float32) for x in pair] for pair in ((W, g), (dW, dg)))

    def stage(W: jax.Array, g: jax.Array) -> jax.Array:
        return _encouraged(g, W, 0.1, 1.2, False)[0]

    found = jax.jit(lambda: jax.jvp(stage, primals, tangents)[1])()
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)  # float32, and the error of the differences
    # Backwards and over a batch.
    batch = jax.vmap(stage)
    by_W, by_g = jax.jit(jax.grad(lambda W, g: jnp.vdot(batch(W[None], g[None])[0], tangents[0]), (0, 1)))(*primals)
    backwards = jnp.vdot(by_W, tangents[0]) + jnp.vdot(by_g, tangents[1])
    assert backwards == pytest.approx(float(np.vdot(wanted, dW)), rel=1e-4)


@pytest.mark.slow
def test_second_derivatives_of_the_low_rank_stage() -> None:
    rng = np.random.default_rng(0)
    W = np.diag([3, 2, 1, 1, 0.5, 0.5]) @ np.linalg.qr(rng.standard_normal((10, 10)))[0][:6]
    W, g, way, seen = (jnp.asarray(x, jnp.float32) for x in (W, *rng.standard_normal((3, 6, 10))))
    slope = jax.grad(lambda W: jnp.vdot(_encouraged(g, W, 0.1, 1.2, False)[0], seen))
    along, before, after = jax.jit(
        lambda: (jax.jvp(slope, (W,), (way,))[1], slope(W - 1e-3 * way), slope(W + 1e-3 * way))
    )()
    wanted = (after - before) / 2e-3
    assert jnp.linalg.norm(along - wanted) < 3e-4 * jnp.linalg.norm(wanted)  # differences of float32 values


def test_states_in_8_bits_count_as_constants_and_say_so() -> None:
    tx = automagic_8bit(1e-3, profile="memory_optimized", min_8bit_size=1)
    params = {"w": jnp.ones((4, 4))}

    def moved(scale: jax.Array) -> jax.Array:
        state = tx.init(params)
        for t in range(2):
            updates, state = tx.update({"w": (scale + t) * jnp.arange(16.0).reshape(4, 4)}, state, params)
        return jnp.sum(updates["w"])

    with pytest.warns(UserWarning, match="optim_bits=32"):
        assert jnp.isfinite(jax.jit(jax.grad(moved))(1.0))
