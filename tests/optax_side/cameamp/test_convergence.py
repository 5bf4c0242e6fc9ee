"""The problems on which optax tests its own optimizers: the minimum is reached within 3e-2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from automagic_optax import automagic_8bit

pytestmark = pytest.mark.compiled_quickly
Problem = tuple[Any, Any, Callable[[Any], jax.Array]]


def squared_distance(first: Any, last: Any) -> Problem:
    first, last = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (first, last))

    def value(x: Any) -> jax.Array:
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(last), strict=True))

    return first, last, value


def parabola() -> Problem:
    return squared_distance(np.array([-1.0, 10.0, 1.0]), np.array([1.0, -1.0, 1.0]))


def matrix_parabola() -> Problem:
    return squared_distance(np.zeros((2, 2)), np.array([[3.0, -2.0], [1.0, 4.0]]))


def mixed_parabola() -> Problem:
    last = (np.array([1.0, -1.0, 2.0]), np.array([[1.0, 0.0], [-1.0, 1.0]]))
    return squared_distance((np.zeros(3), np.zeros((2, 2))), last)


def rosenbrock() -> Problem:
    def value(x: jax.Array) -> jax.Array:
        return jnp.square(1.0 - x[0]) + 100.0 * jnp.square(x[1] - x[0] ** 2)

    return jnp.zeros(2), jnp.ones(2), value


EVEN_HERE_8_BIT = {"min_8bit_size": 1}


@pytest.mark.parametrize(
    ("problem", "fields"),
    [
        (parabola, {}),
        (matrix_parabola, {}),
        (mixed_parabola, {}),
        (rosenbrock, {}),
        (mixed_parabola, EVEN_HERE_8_BIT),
        (rosenbrock, EVEN_HERE_8_BIT),
    ],
)
def test_reaches_the_minimum(problem: Callable[[], Problem], fields: dict[str, Any]) -> None:
    first, last, value = problem()
    tx = automagic_8bit(1e-2, max_lr=1.0, warmup_steps=0, **fields)

    @jax.jit
    def run(x: Any) -> Any:
        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            x, state = carry
            updates, state = tx.update(jax.grad(value)(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=30_000)[0][0]

    # optax's own tolerance for these problems, after its number of steps.
    for a, b in zip(jax.tree.leaves(run(first)), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-2, atol=3e-2)
