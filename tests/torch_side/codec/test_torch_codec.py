"""Section 3 in PyTorch: random bits, codes, scales, rounding."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from automagic_core import (
    Slot,
    absmax_shape,
    codebook_midpoints,
    dynamic_codebook,
    mix32,
    random_unit,
    rounding_key,
)
from automagic_torch.cameamp.round_to_parameters import add_updates, stochastically_rounded
from automagic_torch.codec import random_bits as torch_bits
from automagic_torch.codec.quantized_tensor import QuantizedTensor

CPU = torch.device("cpu")


def write(x, companded, block_size, key):
    """One array, as a batch of one: codes and scales without the batch axis."""
    stored = QuantizedTensor.write(x[None], companded, block_size, key)
    return Stored(stored.codes[0], stored.absmax[0], stored.read()[0])


class Stored(NamedTuple):
    codes: torch.Tensor
    absmax: torch.Tensor
    values: torch.Tensor


@given(hnp.arrays(np.uint32, st.integers(1, 50)))
def test_mix32_is_that_of_the_core(words):
    ours = torch_bits.mix32(torch.from_numpy(words.view(np.int32).copy()))
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), mix32(words))


@given(st.integers(1, 2**31 - 1), st.sampled_from(list(Slot)), st.integers(1, 2000))
def test_random_unit_is_that_of_the_core(step, slot, numel):
    ours = torch_bits.random_unit(rounding_key(step, slot, numel), numel, CPU)
    np.testing.assert_array_equal(ours.numpy(), random_unit(step, slot, numel))


def nearest_code(y, signed):
    """The page's rule, with the tie to the even code, one element at a time."""
    midpoints = codebook_midpoints(signed)
    below = np.searchsorted(midpoints, y, side="left")
    above = np.searchsorted(midpoints, y, side="right")
    return np.where(below % 2 == 0, below, above)


@pytest.mark.parametrize("companded", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (16, 33), (2, 256)])
def test_one_block_rounds_to_the_nearest_code(companded, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored = write(x * x if companded else x, companded, None, None)
    values = (x * x).sqrt() if companded else x
    scale = np.float32(values.abs().max())
    y = values.numpy() * (np.float32(1) / scale)
    assert stored.absmax.shape == (1,)
    assert stored.absmax.item() == scale
    np.testing.assert_array_equal(stored.codes.numpy(), nearest_code(y, not companded))


def test_one_block_gives_ties_to_the_even_code():
    midpoints = torch.tensor(codebook_midpoints(True))
    codes = write(torch.cat([midpoints, torch.ones(1)]), False, None, None).codes[:-1]
    assert (codes % 2 == 0).all()
    assert codes.tolist() == [k + k % 2 for k in range(255)]


@pytest.mark.parametrize("block_size", [64, 256, None])
@pytest.mark.parametrize("shape", [(), (5,), (300,), (3, 512), (7, 11, 13)])
@pytest.mark.parametrize("companded", [False, True])
def test_reading_is_close_to_what_was_written(block_size, shape, companded):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x = x * x if companded else x
    for key in (None, 123):
        stored = write(x, companded, block_size, key)
        assert stored.codes.dtype == torch.uint8
        assert stored.codes.shape == x.shape
        assert stored.absmax.shape == absmax_shape(tuple(shape), block_size)
        error = (stored.values - x).abs().max() / x.abs().max()
        assert error < (0.04 if companded else 0.02)


@pytest.mark.parametrize("block_size", [64, None])
@pytest.mark.parametrize("companded", [False, True])
@pytest.mark.parametrize("level", [0.0, 1e-40, 0.9 * 2.0**-120])
def test_a_block_too_small_to_divide_by_is_a_block_of_zeros(block_size, companded, level):
    level = level * level if companded else level  # float32 makes the squares 0; their root is below the limit too
    x = torch.full((64,), level)
    for key in (None, 5):
        stored = write(x, companded, block_size, key)
        assert not stored.codes.any()
        assert not stored.absmax.any()
        assert not stored.values.any()


def test_zero_blocks_leave_their_neighbours_alone():
    x = torch.cat([torch.zeros(64), torch.linspace(-1, 1, 64), torch.full((10,), 1e-38)])
    stored = write(x, False, 64, 99)
    assert stored.absmax.tolist() == [0.0, 1.0, 0.0]
    assert (stored.values[64:128] - x[64:128]).abs().max() < 0.02


@pytest.mark.parametrize("block_size", [64, None])
@pytest.mark.parametrize("companded", [False, True])
def test_stochastic_rounding_is_the_pages_rule(block_size, companded):
    x = torch.randn(200, generator=torch.Generator().manual_seed(3))
    x = x * x if companded else x
    key = rounding_key(7, Slot.exp_avg, 200)
    plain = write(x, companded, block_size, None)
    rounded = write(x, companded, block_size, key)
    codebook = dynamic_codebook(not companded)
    values = (x.sqrt() if companded else x).numpy()
    width = block_size or 200
    scale = plain.absmax.numpy()[np.arange(200) // width]
    k = plain.codes.numpy().astype(int)
    e = values * (np.float32(1) / scale) - codebook[k]
    neighbour = np.clip(k + np.sign(e).astype(int), 0, 255)
    gap = np.abs(codebook[neighbour] - codebook[k])
    p = np.minimum(1, np.abs(e) / np.where(neighbour == k, 1, gap)) * (neighbour != k)
    expected = np.where(random_unit(7, Slot.exp_avg, 200) < p, neighbour, k)
    np.testing.assert_array_equal(rounded.codes.numpy(), expected)
    assert (expected != k).sum() > 20


@pytest.mark.parametrize("block_size", [256, None])
def test_stochastic_rounding_is_unbiased(block_size):
    x = torch.randn(512, generator=torch.Generator().manual_seed(4)).clamp(min=-1.5)
    x[::256] = 2.0  # the signed map ends at −0.993 · absmax
    draws = [write(x, False, block_size, rounding_key(t, 0, 512)).values for t in range(1, 801)]
    gap = 2.0 * 0.0141
    assert (torch.stack(draws).mean(0) - x).abs().max() < 6 * gap / 2 / 800**0.5


def test_without_stochastic_rounding_a_second_moment_stalls():
    v = {key: torch.ones(2048) for key in ("float32", "nearest", "stochastic")}
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 3001):
        q = (0.3 * torch.randn(2048, generator=generator)) ** 2
        for name in v:
            v[name] = 0.999 * v[name] + 0.001 * q
        for name, key in (("nearest", None), ("stochastic", rounding_key(t, Slot.exp_avg_sq, 2048))):
            v[name] = write(v[name], True, 256, key).values
    mean = {name: value.mean().item() for name, value in v.items()}
    assert mean["float32"] == pytest.approx(0.135, abs=0.005)
    assert mean["stochastic"] == pytest.approx(mean["float32"], rel=0.03)
    assert mean["nearest"] > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_half_precision_rounds_to_one_of_the_two_neighbours(dtype, values):
    x = torch.tensor(values, dtype=torch.float32)
    r = random_unit(3, Slot.parameters, len(values))
    result = stochastically_rounded(x[None], dtype, rounding_key(3, Slot.parameters, len(values)))[0]
    assert result.dtype == dtype
    assert result.isfinite().all()
    for value, rounded, draw in zip(x, result, r, strict=True):
        magnitude = abs(value.item())
        low = magnitude if magnitude <= torch.finfo(dtype).max else torch.finfo(dtype).max
        low = torch.tensor(low).to(dtype)
        if low.double().item() > magnitude:
            low = torch.nextafter(low, torch.zeros_like(low))
        high = torch.nextafter(low, torch.full_like(low, torch.inf))
        below, above = low.double().item(), high.double().item()
        fraction = np.float32((magnitude - below) / (above - below)) if np.isfinite(above) else 0
        assert abs(rounded.double().item()) == (above if draw < fraction else below)
        assert torch.signbit(rounded) == torch.signbit(value)


def test_half_precision_rounding_is_unbiased_where_nearest_loses_the_update():
    start = torch.full((4096,), 0.02, dtype=torch.bfloat16)
    delta, ok = torch.full((1, 4096), -1e-5), torch.tensor([True])
    stochastic, nearest = start.clone(), start.clone()
    for step in range(1, 21):
        key = rounding_key(step, Slot.parameters, 4096)
        add_updates([stochastic], stochastic[None], delta, ok, key)
        add_updates([nearest], nearest[None], delta, ok, None)
    assert torch.equal(nearest, start)
    assert (stochastic.double() - start.double()).mean().item() == pytest.approx(-2e-4, rel=0.1)


@pytest.mark.parametrize("companded", [False, True])
@pytest.mark.parametrize("block_size", [64, 256, None])
@pytest.mark.parametrize("shape", [(), (7,), (300,), (4, 64), (3, 5, 11)])
def test_arrays_of_a_batch_are_coded_as_each_alone(shape, block_size, companded):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(5)) * (10.0 ** torch.linspace(-3, 3, 5)).view(
        5, *[1] * len(shape)
    )
    x[3] = 0.0
    x = x * x if companded else x
    for key in (None, 77):
        together = QuantizedTensor.write(x, companded, block_size, key)
        values = together.read()
        assert together.codes.is_contiguous()
        for index, one in enumerate(x):
            alone = write(one, companded, block_size, key)
            assert torch.equal(together.codes[index], alone.codes)
            assert torch.equal(together.absmax[index], alone.absmax)
            assert torch.equal(values[index], alone.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_a_batch_share_their_random_bits(dtype):
    one = torch.randn(3, 7, generator=torch.Generator().manual_seed(6))
    rounded = stochastically_rounded(torch.stack([one, -one, one]), dtype, 11)
    assert torch.equal(rounded[0], rounded[2])
    assert torch.equal(rounded[0], -rounded[1])
    assert torch.equal(rounded[0], stochastically_rounded(one[None], dtype, 11)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_skipped_parameter_keeps_its_bits(dtype):
    p = [torch.tensor([torch.inf, -0.0, torch.nan, 1.0], dtype=dtype) for _ in range(2)]
    before = torch.stack(p)
    add_updates(p, before, torch.full((2, 4), 0.5), torch.tensor([False, True]), 3)
    # A NaN stays one; which of its many bit patterns it has, CUDA's copies of half precision decide.
    assert torch.equal(p[0].isnan(), before[0].isnan())
    assert torch.equal(p[0].nan_to_num(posinf=torch.inf), before[0].nan_to_num(posinf=torch.inf))
    assert p[0][1].signbit()
    assert p[1][[0, 1, 3]].tolist() == [torch.inf, 0.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_nan_stays_one(dtype):
    bits = torch.tensor([[0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000]], dtype=torch.int32)
    assert stochastically_rounded(bits.view(torch.float32), dtype, 5).isnan().all()
