"""An update carried out in parts is the update, and holds one array's float32 states at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.xla_metadata import set_xla_metadata

from automagic_optax import quantize_state
from automagic_optax.moments.in_turn import in_turn
from automagic_optax.moments.moment_kinds import begins_with_parameters
from tests.optax_side.small import assert_same_bits


class Shelf:
    """States stored as their negatives, with a record of what was done."""

    def __init__(self, values: list[jax.Array]) -> None:
        self.stored: list[Any] = [-x for x in values]
        self.record: list[str] = []

    def read(self, position: int) -> jax.Array:
        self.record.append(f"read {position}")
        return -self.stored[position]

    def write(self, position: int, value: jax.Array) -> None:
        self.record.append(f"write {position}")
        self.stored[position] = -value


VALUES = [jnp.arange(3.0) + i for i in range(4)]


def run(function: Any) -> Shelf:
    """Runs it in parts and checks the values against those of a plain call."""
    shelf = Shelf(VALUES)
    results = in_turn(function, VALUES, shelf)
    expected, new = function(VALUES)
    assert_same_bits(results, expected)
    assert_same_bits(shelf.stored, [-x for x in new])
    assert sorted(shelf.record) == sorted(f"{do} {i}" for do in ("read", "write") for i in range(4))
    return shelf


def test_what_belongs_together_is_read_together() -> None:
    def pairs(x: list[Any]) -> tuple[list[Any], list[Any]]:
        return [x[0] * x[2], x[1] * x[3]], [x[0] + 1, x[1] + 1, x[2] * 2, x[3] * 2]

    assert run(pairs).record == [f"{do} {i}" for part in ((0, 2), (1, 3)) for do in ("read", "write") for i in part]


def test_states_that_nothing_depends_on_or_that_depend_on_nothing() -> None:
    weight = jnp.float32(3)

    def function(x: list[Any]) -> tuple[list[Any], list[Any]]:
        return [weight * 2, jnp.float32(5), x[1]], [jnp.zeros(3), x[1], x[3], x[2] * weight]

    record = run(function).record
    assert record[:2] == ["read 1", "write 1"]
    assert record.index("read 3") < record.index("write 2")  # the new 2 is the old 3


def test_what_couples_all_results_reads_all() -> None:
    def function(x: list[Any]) -> tuple[list[Any], list[Any]]:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(a)) for a in x))
        return [a / norm for a in x], [jnp.where(a > 1, a, 0) for a in x]

    assert run(function).record == [f"{do} {i}" for do in ("read", "write") for i in range(4)]


def test_effects_stay_in_their_order(capfd: pytest.CaptureFixture[str]) -> None:
    def function(x: list[Any]) -> tuple[list[Any], list[Any]]:
        jax.debug.print("last {}", x[3][0], ordered=True)
        jax.debug.print("first {}", x[0][0], ordered=True)
        return [x[0], x[3]], x

    jax.block_until_ready(jax.jit(lambda: in_turn(function, VALUES, Shelf(VALUES)))())
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["last", "3.0", "first", "0.0"]


def test_which_states_begin_with_the_parameters() -> None:
    @jax.jit
    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    def init(weights: Any) -> Any:
        return {
            "copy": weights["a"].copy(),
            "jitted zeros": zeros(weights["a"]),
            "scaled": jnp.maximum(jnp.abs(weights["b"]), 1e-3),
            "full": jnp.full_like(weights["a"], 0.1),
            "count": jnp.int32(weights["a"].size),
        }

    weights = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    found = dict(zip(sorted(init(weights)), begins_with_parameters(init, weights), strict=True))
    assert found == {"copy": True, "jitted zeros": False, "scaled": True, "full": False, "count": False}


@pytest.mark.parametrize(
    "name", ["sgd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("adamw", "ademamix", "clipped adamw"))]
)
def test_temporary_memory_is_that_of_one_array(name: str) -> None:
    tx = {
        "sgd": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(1e-3),
        "ademamix": optax.contrib.ademamix(1e-3),
        "clipped adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    }[name]
    count = 12

    def temporary(tx: Any) -> tuple[int, Any]:
        weights = {str(i): jnp.ones((256, 256)) for i in range(count)}
        state = tx.init(weights)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(weights: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
            updates, state = tx.update(gradient, state, weights)
            return optax.apply_updates(weights, updates), state

        analysis = step.lower(weights, state, weights).compile().memory_analysis()
        return int(analysis.temp_size_in_bytes), state

    held, state = temporary(quantize_state(tx))
    states = len([x for x in jax.tree.leaves(state) if x.dtype == np.uint8]) // count
    one_array = 4 * 256 * 256
    # What 32-bit states need is needed here too (clipping holds all clipped gradients); beyond that each state of one
    # array, its new value, and up to three of the codec's own.
    beyond = held - temporary(tx)[0]
    assert beyond <= (2 * states + 3) * one_array
    assert beyond < 0.5 * states * count * one_array  # all states in float32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU computes states in chunks")
def test_the_update_of_a_large_array_takes_the_place_of_its_gradient() -> None:
    tx = quantize_state(optax.adamw(1e-3))
    weights = jax.ShapeDtypeStruct((2048, 1024), jnp.float32)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, x: Any) -> tuple[Any, Any]:
        gradient = jax.grad(lambda w: jnp.tanh(x @ w).sum())(weights)
        updates, state = tx.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    x = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    compiled = step.lower(weights, jax.eval_shape(tx.init, weights), x).compile()
    # Beyond the gradient some ten float32 values of each element of a chunk, of which the array has eight.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * weights.size * (1 + 10 / 8)


def test_states_that_others_read_are_not_computed_in_batches() -> None:
    """D-Adaptation sums over all states before it uses them."""
    rng = np.random.default_rng(0)
    params, *grads = (
        {f"layer {i}": jnp.asarray(rng.normal(size=(64, 80)) * 0.1 + 0.05, jnp.float32) for i in range(4)}
        for _ in range(3)
    )

    def last_update(tx: optax.GradientTransformation) -> Any:
        now, state, updates = params, tx.init(params), None
        for g in grads:
            updates, state = jax.jit(tx.update)(g, state, now)
            now = optax.apply_updates(now, updates)
        return updates

    plain = last_update(optax.contrib.dadapt_adamw())
    stored = last_update(quantize_state(optax.contrib.dadapt_adamw(), stochastic_rounding=False))
    for name, u in plain.items():
        assert float(jnp.median(stored[name] / u)) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("shapes", [[(1024, 1024)], [(16, 256)] * 4], ids=["in chunks", "in a batch"])
def test_a_moment_that_is_a_result_too_takes_one_step(shapes: list[tuple[int, int]]) -> None:
    # The snapshot is the new momentum itself.  It was computed again, from a momentum that was stored already.
    tx = quantize_state(optax.chain(optax.trace(0.5), optax.snapshot("last", lambda u: u)))
    params = {f"layer {i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}
    state = tx.init(params)
    for expected in (1.0, 1.5, 1.75):  # numbers that 8 bits hold where all of a block are equal
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        for u in jax.tree.leaves(updates):
            np.testing.assert_allclose(u, expected, rtol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU computes states in chunks")
@pytest.mark.parametrize("shape", [(1024, 1024), (16, 256)], ids=["in chunks", "in a batch"])
def test_what_was_in_force_around_an_operation_stays_so(shape: tuple[int, int]) -> None:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new = {}
        for name, g in updates.items():
            with set_xla_metadata(kind=name[0]):
                new[name] = 0.5 * state[name] + g
        return new, new

    plain = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    # Eight of each kind are two batches, since operations of unlike kinds are not the same.
    params = {f"{kind}{i}": jnp.zeros(shape) for kind in "ab" for i in range(1 if shape[0] > 16 else 8)}
    tx = quantize_state(plain)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    for kind in "ab":
        assert f'kind = "{kind}"' in text
