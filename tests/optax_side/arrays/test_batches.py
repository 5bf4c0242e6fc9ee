"""Arrays in batches give what they give alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from automagic_optax import automagic_8bit
from automagic_optax.arrays import batches
from automagic_optax.arrays.batches import enter, in_batches
from tests.optax_side.oracle_runs import relative
from tests.optax_side.small import assert_same_bits, find_state

pytestmark = pytest.mark.compiled_quickly
# Adapters of two shapes that are each other's transposes, small and large enough for 8 bits; convolutions; vectors; and
# arrays that nothing is like.
SHAPES = [(16, 96), (5,), (96, 16), (4, 3, 3, 3), (16, 96), (7, 3), (5,), (96, 16), (4, 3, 3, 3), (16, 96), (0, 3), ()]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SMALLEST_BATCH", 2)


def leaves(shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def test_arrays_of_one_shape_dtype_and_kind_are_together() -> None:
    arrays: list[Any] = [*leaves(), None]
    arrays[6] = arrays[6].astype(jnp.bfloat16)
    kinds = ["b" if position == 8 else "a" for position in range(len(arrays))]
    batched = in_batches(arrays, kinds)
    assert batched.positions == ((0, 4, 9), (1,), (2, 7), (3,), (5,), (6,), (8,), (11,))
    assert [x.shape for x in batched.map(lambda x: x)[:4]] == [(3, 16, 96), (5,), (2, 96, 16), (4, 3, 3, 3)]
    assert batched.kinds == ("a",) * 6 + ("b", "a")
    assert_same_bits(batched.flat(), arrays)
    # The way in and the way back through a tree.
    tree = {"x": arrays[:6], "y": tuple(arrays[6:])}
    found, leave = enter(tree, {"x": leaves()[:6], "y": (*leaves()[6:], 0.0)}, kinds)
    assert found.positions == batched.positions
    assert_same_bits(leave(found), tree)


def test_a_stage_finds_its_batches_ready_or_makes_them_anew() -> None:
    arrays = leaves()
    batched = in_batches(arrays, ["a"] * len(arrays))
    assert enter(batched, arrays)[0] is batched
    same, leave = enter(batched, arrays, [x.shape[:1] for x in arrays])
    assert all(ours is theirs for ours, theirs in zip(same.arrays, batched.arrays, strict=True))
    assert same.kinds[0] == (16,)
    assert leave(same) is same
    other, _ = enter(batched, arrays, [i == 4 for i in range(len(arrays))])
    assert other.positions[:2] == ((0, 9), (1, 6))
    assert_same_bits(other.flat(), arrays)


def test_large_arrays_are_alone_and_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [jnp.zeros(n) for n in (10, 11, 10, 11, 10, 10, 10)]
    monkeypatch.setattr(batches, "LARGEST_ARRAY", 10)
    monkeypatch.setattr(batches, "LARGEST_BATCH", 29)
    assert in_batches(arrays, [()] * 7).positions == ((0, 2), (1,), (3,), (4, 5), (6,))
    # Of equal size, so that they share their kernels: not (0, 2, 4, 5) and (6,).
    monkeypatch.setattr(batches, "LARGEST_BATCH", 49)
    assert in_batches(arrays, [()] * 7).positions == ((0, 2, 4), (1,), (3,), (5, 6))


def test_a_few_arrays_are_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    few, enough = [jnp.zeros(3)] * 3, [jnp.ones(4)] * 4
    batched = in_batches([*few, *enough], [()] * 7)
    assert batched.positions == ((0,), (1,), (2,), (3, 4, 5, 6))
    assert_same_bits(batched.flat(), [*few, *enough])


@pytest.mark.slow  # the oracle has batches too: test_stages_oracle
def test_the_whole_optimizer_gives_what_it_gives_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # The adapters have 8-bit states, all others 32-bit ones.
    tx = automagic_8bit(
        1e-3,
        min_8bit_size=1024,
        warmup_steps=4,
        torque_decay=0.5,
        percentile_clipping=50,
        rank_penalty_strength=0.3,
        factored="none",
        lora=lambda path, leaf: 96 in leaf.shape,
    )
    shapes = SHAPES[:7]
    params = leaves(shapes)
    state = tx.init(params)
    together, alone = (jax.jit(lambda *arguments: tx.update(*arguments)) for _ in range(2))
    rng = np.random.default_rng(1)
    for step in range(5):
        # An overall size that falls and rises, so that stage 1 clips.
        size = (1.0, 0.5, 2.0, 0.7, 3.0)[step]
        grads = [jnp.asarray(size * rng.standard_normal(shape), jnp.float32) for shape in shapes]
        if step in (1, 3):
            for i in (4, 6):
                grads[i] = grads[i].at[0].set(jnp.nan)
        # Each step of both from one state: free runs of 8-bit states drift apart by single codes.
        expected = together(grads, state, params)
        with monkeypatch.context() as patch:
            patch.setattr(batches, "LARGEST_ARRAY", 0)
            found = alone(grads, state, params)
        _assert_close(found, expected)
        params, state = [w + u for w, u in zip(params, expected[0], strict=True)], expected[1]
    assert [int(n) for n in find_state(state).skipped_steps] == [2 * (i in (4, 6)) for i in range(len(shapes))]


def _assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    named = jax.tree_util.tree_leaves_with_path(ours)
    for (path, a), b in zip(named, jax.tree.leaves(theirs), strict=True):
        name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
        if a.dtype == np.uint8 and "codes" in name:
            distance = np.abs(a.astype(int) - b.astype(int))
            assert distance.max() <= 1, name
            assert (distance > 0).mean() < 1e-3, name
        elif a.dtype == np.float32:
            # Sums in another order; energies removed are differences from 1.
            close = abs(a - b) <= 1e-6 if "energy_removed" in name else relative(a, b) <= 1e-6
            assert close, (name, relative(a, b))
        else:
            assert np.array_equal(a, b), name
