"""`quantize_state` trains the byte transformer as 32-bit states do, in about a quarter of their memory."""

from __future__ import annotations

import pytest

from automagic_optax import quantize_state
from benchmarks.byte_transformer import Shape
from benchmarks.quantize_state import OPTIMIZERS, bytes_of_states, optimizer, train


def check(name: str, shape: Shape, steps: int, batch: int, least: int, at_most: float) -> None:
    inner = optimizer(name, steps)
    plain = train(inner, shape, steps, batch)
    eight = train(quantize_state(inner, min_8bit_size=least), shape, steps, batch)
    assert plain.loss < at_most  # from 5.5 at the start
    assert abs(eight.loss / plain.loss - 1) < 0.01
    before, after = bytes_of_states(plain), bytes_of_states(eight)
    # 1 byte and 4 / 256 of 4 bytes are 25.4 %; norms and biases of 64 to 384 elements keep 4 bytes.
    assert 0.25 * before[False] < after[False] <= 0.27 * before[False]
    assert after[True] == before[True]
    assert (before[True] > 0) == (name == "schedule_free_adamw")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_is_that_of_32_bits(name: str) -> None:
    check(name, Shape(), 200, 16, 4096, 3.0)  # below the 3.1 of bytes without a context


@pytest.mark.slow
def test_a_small_run_of_sgd() -> None:
    check("sgd", Shape(layers=1, width=64, heads=2, context=16), 60, 8, 1024, 3.6)
