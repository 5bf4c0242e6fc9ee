"""The signs of the walk are the same in numpy, the oracle, PyTorch and JAX, bit for bit."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
import torch

from automagic_core import Slot, rounding_key
from automagic_core import walk_signs as core_signs
from automagic_optax.codec.random_bits import walk_signs
from automagic_torch.codec.random_bits import signs
from tests.oracle.codec import random_unit


@pytest.mark.parametrize("shape", [(), (1,), (0,), (1000,), (37, 41), (3, 4, 5, 6)], ids=str)
def test_the_signs_are_the_same_everywhere(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    expected = core_signs(size)
    # The highest bit of the words, of which random numbers have the upper 24.
    np.testing.assert_array_equal(expected, np.where(random_unit(0, Slot.walk, size) < 0.5, 1, -1))
    for function in (walk_signs, jax.jit(walk_signs, static_argnums=0)):
        ours = np.asarray(function(shape))
        assert (ours.shape, ours.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(ours.ravel(), expected)
    theirs = signs(rounding_key(0, Slot.walk, size), size, torch.device("cpu"))
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(theirs.numpy(), expected)


def test_a_piece_has_the_signs_of_the_whole() -> None:
    size, first, count = 3000, 1234, 567
    whole = core_signs(size)
    piece = core_signs(size, np.arange(first, first + count))
    np.testing.assert_array_equal(piece, whole[first : first + count])
    key = (rounding_key(0, Slot.walk, size) + first) % 2**32
    np.testing.assert_array_equal(signs(key, count, torch.device("cpu")).numpy(), piece)
    # As many of one sign as of the other, to four standard deviations.
    assert abs(int(whole.sum())) <= 4 * math.sqrt(size)
    assert not np.array_equal(core_signs(size + 1)[:size], whole)
