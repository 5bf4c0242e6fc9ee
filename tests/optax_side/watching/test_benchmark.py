"""`benchmark_optimizer` measures jitted updates and leaves everything as it was."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from automagic_optax import automagic_8bit, benchmark_optimizer, memory_report
from tests.optax_side.small import assert_same_bits, params

pytestmark = pytest.mark.compiled_quickly
TX = automagic_8bit(1e-3, warmup_steps=4)


def check(result: dict[str, Any], num_steps: int, parameters: int) -> None:
    assert (result["num_steps"], result["parameters"]) == (num_steps, parameters)
    assert 0 < result["min_ms"] <= result["median_ms"]
    assert result["min_ms"] <= result["mean_ms"]
    assert result["compile_ms"] > 0
    # Parameters, gradients and state are there at once.
    assert result["peak_memory_bytes"] > 8 * parameters + result["state_bytes"]


def test_plain_parameters() -> None:
    weights = params()
    result = benchmark_optimizer(weights, TX, num_steps=3)
    check(result, 3, 4149)
    assert result["state_bytes"] == memory_report(TX.init(weights))["state_bytes"]
    assert_same_bits(weights, params())


def test_an_nnx_model_with_its_optimizer() -> None:
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), TX)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, (nnx.state(model), nnx.state(optimizer)))
    check(benchmark_optimizer(model, optimizer, num_steps=2), 2, 64 * 64 + 64)
    assert_same_bits((nnx.state(model), nnx.state(optimizer)), before)
    with pytest.raises(ValueError, match=r"an nnx model needs its nnx\.Optimizer"):
        benchmark_optimizer(model, tx)


def test_compiling_and_warming_up_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("automagic_optax.watching.benchmark.time.perf_counter", lambda: next(clock) / 1000)
    calls = []

    def counting(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    tx = optax.GradientTransformation(lambda params: optax.EmptyState(), counting)
    result = benchmark_optimizer({"w": jnp.ones(3, jnp.bfloat16)}, tx, num_steps=5)
    jax.effects_barrier()
    assert len(calls) == 8
    names = ("mean_ms", "median_ms", "min_ms", "compile_ms")
    assert [result[name] for name in names] == pytest.approx([1.0] * 4)  # between two looks at the clock


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match="num_steps = 0 is not valid; valid: an integer ≥ 1"):
        benchmark_optimizer(params(), TX, 0)
    with pytest.raises(ValueError, match="no parameters"):
        benchmark_optimizer({}, TX)
