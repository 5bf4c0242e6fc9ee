"""`quantize_state` trains the byte transformer as 32-bit states do, in about a quarter of their memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest

from automagic_optax import QuantizedMoment, quantize_state
from automagic_optax.parameter_places import parameter_places
from benchmarks import byte_transformer

c = optax.contrib
Schedule = Callable[[Any], Any]

# Rates at which each trains well here: what rounding costs would be hidden in a run that goes nowhere.
OPTIMIZERS: dict[str, Callable[[Callable[[float], Schedule]], Any]] = {
    "adam": lambda peak: optax.adam(peak(3e-3)),
    "adamw": lambda peak: optax.adamw(peak(3e-3)),
    "adabelief": lambda peak: optax.adabelief(peak(3e-3)),
    "lion": lambda peak: optax.lion(peak(5e-4)),
    "sgd": lambda peak: optax.sgd(peak(0.3), momentum=0.9),
    "rmsprop": lambda peak: optax.rmsprop(peak(1e-3), decay=0.99),
    "nadamw": lambda peak: optax.nadamw(peak(3e-3)),
    "adan": lambda peak: optax.adan(peak(3e-3)),
    "ademamix": lambda peak: c.ademamix(peak(2e-3)),
    "muon": lambda peak: c.muon(peak(1e-2)),
    "schedule_free_adamw": lambda peak: c.schedule_free_adamw(3e-3, warmup_steps=30),
}


def train(tx: Any, shape: byte_transformer.Shape, steps: int, batch: int) -> tuple[Any, Any, float]:
    """Parameters, state, and the mean training loss of the last sixth of the steps."""
    params = byte_transformer.initial_params(jax.random.key(0), shape)
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, windows: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(byte_transformer.loss)(params, windows, shape)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    text, rng = byte_transformer.standard_library().train, np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state, byte_transformer.windows(text, batch, shape.context, rng))
        losses.append(loss)
    return params, state, float(np.mean(jax.device_get(losses[-steps // 6 :])))


def bytes_of_states(params: Any, state: Any) -> dict[bool, int]:
    """Bytes of all states in the parameters' shapes; under True those of copies of the parameters."""
    found = {True: 0, False: 0}
    places = parameter_places(params, state, is_leaf=lambda x: isinstance(x, QuantizedMoment))
    for place in places:
        if place.array.shape == place.parameter.shape:
            found[place.field == "z"] += sum(x.nbytes for x in jax.tree.leaves(place.array))
    return found


def check(name: str, shape: byte_transformer.Shape, steps: int, batch: int, least: int, at_most: float) -> None:
    def peak(rate: float) -> Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)

    inner = OPTIMIZERS[name](peak)
    params, state, expected = train(inner, shape, steps, batch)
    plain = bytes_of_states(params, state)
    params, state, loss = train(quantize_state(inner, min_8bit_size=least), shape, steps, batch)
    eight = bytes_of_states(params, state)
    assert expected < at_most  # from 5.5 at the start
    assert abs(loss / expected - 1) < 0.01
    # 1 byte and 4 / 256 of 4 bytes are 25.4 %; norms and biases of 64 to 384 elements keep 4 bytes.
    assert 0.25 * plain[False] < eight[False] <= 0.27 * plain[False]
    assert eight[True] == plain[True]
    assert (plain[True] > 0) == (name == "schedule_free_adamw")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_is_that_of_32_bits(name: str) -> None:
    check(name, byte_transformer.Shape(), 200, 16, 4096, 3.0)  # below the 3.1 of bytes without a context


@pytest.mark.slow
def test_a_small_run_of_sgd() -> None:
    check("sgd", byte_transformer.Shape(layers=1, width=64, heads=2, context=16), 60, 8, 1024, 3.6)
