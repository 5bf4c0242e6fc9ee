"""States in another order of axes: what moves exactly, what is rounded again, and what is refused."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from automagic_core import axes_between, dynamic_codebook
from automagic_core.arrays.axes import inverse_axes, keeps_memory_order
from automagic_core.moving.neutral import check_group, in_layout
from automagic_core.moving.notes import Notes
from tests.core_side.neutral_samples import assert_same_states, random_group

SHAPES = st.integers(0, 5).flatmap(lambda n: st.tuples(*[st.integers(1, 7)] * n))


TABLE = {
    (): (),
    (5,): (5,),
    (5, 3): (3, 5),
    (5, 3, 7): (7, 3, 5),
    (5, 3, 7, 2): (7, 2, 3, 5),
    (5, 3, 7, 2, 4): (7, 2, 4, 3, 5),
}


@pytest.mark.parametrize(("shape", "expected"), TABLE.items())
def test_the_table_of_section_1(shape, expected):
    axes = axes_between(len(shape), "torch", "flax")
    assert np.zeros(shape).transpose(axes).shape == expected
    assert axes_between(len(shape), "flax", "torch") == inverse_axes(axes)
    unmoved = tuple(range(len(shape)))
    assert axes_between(len(shape), "torch", "flax", embedding=True) == unmoved
    assert axes_between(len(shape), "flax", "flax") == unmoved
    with pytest.raises(ValueError, match="layout = 'keras'"):
        axes_between(2, "torch", "keras")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(["none", "second_moment", "all"]), st.booleans(), st.booleans())
def test_float32_states_come_back_bit_for_bit(shape, factored, warming, embedding):
    embeddings = ("a",) if embedding and len(shape) == 2 else ()
    fields = {"factored": factored, "optim_bits": 32}
    group = random_group({"a": shape}, step=4 if warming else 12, embeddings=embeddings, **fields)
    notes = Notes()
    there, rounded = in_layout(group, "flax", None, notes)
    check_group(there, "there")
    back, again = in_layout(there, "torch", None, notes)
    assert (rounded, again, notes.tell("automagic_core")) == ([], [], [])
    assert_same_states(back.arrays[0].states, group.arrays[0].states)
    if embeddings:
        assert_same_states(there.arrays[0].states, group.arrays[0].states)
    elif len(shape) > 1:
        # The meaning, not only the way back: element [o, i, ...] and row o are found where Flax has them.
        old, new = group.arrays[0].states, there.arrays[0].states
        np.testing.assert_array_equal(np.moveaxis(np.moveaxis(new["exp_avg"], -1, 0), -1, 1), old["exp_avg"])
        np.testing.assert_array_equal(new["lr_mask"].reshape(-1), old["lr_mask"].reshape(-1))
        if warming:
            np.testing.assert_array_equal(new["walk"].reshape(-1), old["walk"].reshape(-1))
        assert new["lr_mask"].shape == (1,) * (len(shape) - 1) + shape[:1]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 5).flatmap(lambda n: st.tuples(*[st.integers(1, 9)] * n)), st.booleans(), st.booleans())
def test_8bit_states_are_rounded_once(shape, stochastic, block_wise):
    fields = {"min_8bit_size": 1, "stochastic_rounding": stochastic, "block_wise": block_wise}
    group = random_group({"a": shape}, factored="none", **fields)
    there, rounded = in_layout(group, "flax", None, Notes())
    check_group(there, "there")
    axes = axes_between(len(shape), "torch", "flax")
    held, moved = group.arrays[0].states, there.arrays[0].states
    if keeps_memory_order(shape, axes) or held["exp_avg_absmax"].size == 1:
        assert rounded == []
        for state in ("exp_avg", "exp_avg_sq", "exp_avg_res", "s"):
            np.testing.assert_array_equal(moved[state], held[state].transpose(axes))
            assert moved[f"{state}_absmax"].tobytes() == held[f"{state}_absmax"].tobytes()
        return
    assert [entry.state for entry in rounded] == ["exp_avg", "exp_avg_sq", "exp_avg_res", "s"]
    for entry in rounded:
        signed = entry.state in ("exp_avg", "s")
        old, new = (_read(g.arrays[0].states, entry.state, signed, block_wise) for g in (group, there))
        old = old.transpose(axes)
        error = np.abs(new - old)
        # Relative to the block's largest value: half the widest gap of the codebook to nearest, all of it
        # stochastically, and 1 − 0.993 at the negative end, where the signed map stops.
        values = dynamic_codebook(signed)
        gap = max(np.diff(values).max() * (1 if stochastic else 0.5), 1 + values[0] if signed else 0)
        # 1e-6: float32 products on either side, relative to the largest value.
        assert error.max() <= (gap + 1e-6) * np.abs(old).max()
        norm = np.linalg.norm(old)
        assert entry.error == pytest.approx(np.linalg.norm(error) / norm if norm else 0, rel=1e-3, abs=1e-7)


def _read(states, name, signed, block_wise):
    codes, absmax = states[name], states[name + "_absmax"]
    width = 64 if block_wise else codes.size
    scale = np.array([absmax.reshape(-1)[i // width] for i in range(codes.size)])
    return (dynamic_codebook(signed)[codes.reshape(-1)] * scale).reshape(codes.shape)


def test_what_is_lost_is_told_for_every_array_and_logged(caplog):
    group = random_group({"one": (70, 66), "two": (65, 65), "bias": (99,)})
    notes = Notes()
    _, rounded = in_layout(group, "flax", None, notes)
    with caplog.at_level(logging.INFO, "automagic_core"):
        told = notes.tell("automagic_core")
    # second_moment: exp_avg, exp_avg_res and, while warming up, s
    assert len(told) == 3
    for entry in rounded:
        assert any(
            f"{entry.array} {100 * entry.error:.2f} %" in sentence and entry.state in sentence for sentence in told
        )
    assert {record.getMessage() for record in caplog.records} == set(told)
    assert not any("bias" in sentence for sentence in told)


def test_rows_that_become_other_axes_are_approximated_and_told():
    # ConvTranspose: (in, out, h, w) to (h, w, in, out); the rows were inputs and are outputs now.
    group = random_group({"up": (6, 5, 3, 4)}, optim_bits=32)
    old = group.arrays[0].states
    rows, columns = np.abs(np.random.default_rng(1).standard_normal((2, 60))).astype(np.float32)
    # Statistics of one array, whose squares are a product: there both kinds of means say all.
    q = rows[:6, None, None, None] * columns.reshape(1, 5, 3, 4)
    old["exp_avg_sq_row"], old["exp_avg_sq_col"] = q.mean((1, 2, 3), keepdims=True), q.mean(0, keepdims=True)
    notes = Notes()
    there, _ = in_layout(group, "flax", {"up": (2, 3, 0, 1)}, notes)
    check_group(there, "there")
    new, expected = there.arrays[0].states, q.transpose(2, 3, 0, 1)
    # Float32 means of 60 values.
    np.testing.assert_allclose(new["exp_avg_sq_row"], expected.mean((0, 1, 2), keepdims=True), rtol=1e-5)
    # The column means are those of the product of the old ones: sums agree, single ones only if q were of rank one in
    # the new rows too.
    np.testing.assert_allclose(new["exp_avg_sq_col"].mean(), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(new["exp_avg_sq_col"], expected.mean(3, keepdims=True), rtol=1e-5)
    # Of the walk all rows' squares are what counts.
    assert np.square(new["walk"]).sum() == pytest.approx(np.square(old["walk"]).sum(), rel=1e-6)
    assert np.all(new["lr_mask"] == old["lr_mask"].mean(dtype=np.float64).astype(np.float32))
    told = notes.tell("automagic_core")
    assert any("exp_avg_sq has its means approximated" in sentence and "up" in sentence for sentence in told)
    assert sum("rows are another axis" in sentence for sentence in told) == 5


def test_axes_by_hand_are_checked():
    group = random_group({"up": (6, 5, 3, 4)})
    with pytest.raises(ValueError, match=r"axes = \(0, 1, 2\) of up are no permutation of its 4 axes"):
        in_layout(group, "flax", {"up": (0, 1, 2)}, Notes())
    with pytest.raises(ValueError, match="axes are given for down"):
        in_layout(group, "flax", {"down": (0, 1, 2, 3)}, Notes())
