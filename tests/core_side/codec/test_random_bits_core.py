"""The counter-based random numbers of section 3 in numpy, against the oracle's own reading of the formula."""

from __future__ import annotations

import numpy as np
import pytest

from automagic_core import MAX_STEP, Slot, mix32, random_unit, rounding_key, walk_signs
from tests.oracle import codec as oracle

STEPS = [1, 2, 3, 1000, 2**24 + 1, 2**31 - 2, 2**31 - 1]


def test_slots_are_the_pages() -> None:
    assert {slot.name: int(slot) for slot in Slot} == {
        "exp_avg": 0,
        "exp_avg_sq": 1,
        "exp_avg_res": 2,
        "s": 3,
        "parameters": 4,
        "walk": 5,
    }
    assert MAX_STEP == 2**31 - 1


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("slot", list(Slot))
def test_random_unit_is_the_oracles(step: int, slot: Slot) -> None:
    for numel in (1, 7, 4096, 100_003):
        ours, theirs = random_unit(step, slot, numel), oracle.random_unit(step, slot, numel)
        assert ours.dtype == np.float32
        assert np.array_equal(ours, theirs)
        assert ours.min() >= 0
        assert ours.max() < 1


@pytest.mark.parametrize("numel", [1, 2, 7, 4096, 100_003])
def test_signs_of_the_walk_are_the_top_bit(numel: int) -> None:
    signs = walk_signs(numel)
    assert signs.dtype == np.int8
    assert np.array_equal(signs, np.where(oracle.random_unit(0, 5, numel) < 0.5, 1, -1))
    index = np.array([[0], [numel - 1]])
    assert np.array_equal(walk_signs(numel, index), signs[index])
    assert abs(signs.mean(dtype=np.float64)) < 4 / np.sqrt(numel)


def test_chosen_indices_of_an_array_too_large_to_make() -> None:
    numel = 2**33 + 5  # indices wrap modulo 2³² inside the hash
    index = np.array([[0, 1], [2**31, 2**32 - 1], [2**32, 2**33]], dtype=np.uint64)
    ours = random_unit(9, Slot.s, numel, index)
    assert ours.shape == index.shape
    assert np.array_equal(ours, oracle.random_unit(9, 3, numel, index.ravel()).reshape(index.shape))
    assert ours[0, 0] == ours[2, 0]  # 0 and 2³² draw the same bits


def test_mix32_and_key_are_the_formula_in_python_integers() -> None:
    def by_hand(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    words = [0, 1, 2, 0xFFFFFFFF, 0x80000000, 0xDEADBEEF]
    assert mix32(np.array(words)).tolist() == [by_hand(x) for x in words]
    assert int(mix32(2**32 + 7)) == by_hand(7)
    for step, slot, numel in [(1, 0, 1), (2**31 - 1, 4, 2**40 + 3), (123456789, 2, 999)]:
        total = (step * 0x9E3779B9 + slot * 0x85EBCA6B + numel) % 2**32
        assert rounding_key(step, slot, numel) == by_hand(total)


def test_draws_are_uniform_and_independent_between_steps_and_slots() -> None:
    n = 2**18
    base = random_unit(5, 0, n).astype(np.float64) - 0.5
    # Standard error of the mean of n uniforms: 1 / √(12 n) = 5.6e-4; four of them.
    assert abs(base.mean()) < 4 / np.sqrt(12 * n)
    assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 4 / np.sqrt(n)
    for step, slot in [(6, 0), (5, 1), (5, 4), (2**31 - 1, 0)]:
        other = random_unit(step, slot, n) - 0.5
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(n)
