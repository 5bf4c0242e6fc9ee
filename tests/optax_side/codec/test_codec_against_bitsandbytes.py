"""The JAX codec beside bitsandbytes: the same codebooks and reading, and where its CPU quantizer is not exact.

bitsandbytes' CPU kernel looks codes up on a grid of 65,536 points over [−1, 1], two points 2 / 65,535 apart.  So it can
only disagree with the exact rule within half a step, 1 / 65,535, of a midpoint.  Near zero the codes are closer
together than the grid: there every y is that near to a midpoint, and the disagreement is the collapse that section 3
describes.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from automagic_optax import QuantizedArray, quantize
from parity.cpu_rule import cpu_code_borders, quantize_cpu_rule
from tests.optax_side.codec_samples import borders, random_values, with_unit_absmax
from tests.oracle import codec as oracle

HALF_STEP = 1 / 65535


def bitsandbytes_quantize(x: np.ndarray, signed: bool, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    codebook = bnb.create_dynamic_map(signed=signed)
    codes, state = bnb.quantize_blockwise(torch.from_numpy(x.copy()), code=codebook, blocksize=block_size)
    return codes.numpy(), state.absmax.numpy()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_dequantization_is_bitsandbytes(signed: bool, block_size: int) -> None:
    x = random_values(1_000_003, signed, seed=7)
    stored = quantize(x, signed=signed, block_size=block_size)
    codes = torch.from_numpy(np.array(stored.codes))
    theirs = bnb.dequantize_blockwise(
        codes,
        absmax=torch.from_numpy(np.array(stored.absmax)),
        code=bnb.create_dynamic_map(signed=signed),
        blocksize=block_size,
    )
    ours = np.asarray(stored.dequantize())
    assert np.array_equal(ours.view(np.uint32), theirs.numpy().view(np.uint32))


@pytest.mark.parametrize("signed", [True, False])
def test_dequantization_of_every_code(signed: bool) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), 5)
    absmax = np.array([0, 1, 0.3, 2.0**-110, 3e38], np.float32)
    theirs = bnb.dequantize_blockwise(
        torch.from_numpy(codes), absmax=torch.from_numpy(absmax), code=bnb.create_dynamic_map(signed), blocksize=256
    ).numpy()
    ours = np.asarray(QuantizedArray(codes, absmax, signed, 256).dequantize())
    # Products below 2⁻¹²⁶ are subnormal, which XLA flushes to zero on a CPU.
    normal = np.abs(theirs) >= 2.0**-126
    assert np.array_equal(ours[normal].view(np.uint32), theirs[normal].view(np.uint32))
    assert np.all(np.abs(ours[~normal]) < 2.0**-126)
    assert normal.sum() > 4 * 250  # all but the zero block, the zeros and a few


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block_size", [64, 256, 4096])
def test_their_cpu_codes_are_the_cpu_rule(signed: bool, block_size: int) -> None:
    codebook = oracle.codebook(signed)
    hard = with_unit_absmax(np.concatenate([borders(signed), cpu_code_borders(codebook)[:200]]), block_size)
    for x in (random_values(1_000_003, signed, seed=8), hard[np.isfinite(hard)]):
        theirs, their_absmax = bitsandbytes_quantize(x, signed, block_size)
        codes, absmax = quantize_cpu_rule(x, codebook, block_size)
        assert np.array_equal(theirs, codes)
        assert np.array_equal(their_absmax.view(np.uint32), absmax.view(np.uint32))


@pytest.mark.parametrize("signed", [True, False])
def test_they_differ_from_the_exact_rule_only_near_midpoints(signed: bool) -> None:
    x = random_values(1_000_003, signed, seed=9)
    theirs, their_absmax = bitsandbytes_quantize(x, signed, 256)
    stored = quantize(x, signed=signed)
    ours, absmax = np.asarray(stored.codes), np.asarray(stored.absmax)
    assert np.array_equal(absmax, their_absmax)

    y = x * np.repeat(np.float32(1) / absmax, 256)[: x.size]
    middle = oracle.midpoints(signed).astype(np.float64)
    above = np.clip(np.searchsorted(middle, y), 1, len(middle) - 1)
    distance = np.minimum(np.abs(y - middle[above - 1]), np.abs(y - middle[above]))
    # Float32 rounds y + 1 and the grid index: up to 2⁻²³ on y and 1/512 of a grid step of 2 / 65,535.
    reach = HALF_STEP * (1 + 2 / 512) + 2.0**-23
    different = ours != theirs
    assert different.sum() > 1000  # the test would see nothing if they agreed
    unexplained = different & (distance > reach)
    assert unexplained.sum() == 0, y[unexplained][:5]

    # Away from the collapse round zero the codes are neighbours, and few.
    large = np.abs(y) > 1e-3
    steps = np.abs(ours[large].astype(int) - theirs[large])
    assert steps.max() == 1
    assert 0 < (steps > 0).mean() < 0.02
    # Zero itself: exact here, 2.1e-5 (signed) or 1.6e-5 (unsigned) of absmax there.
    zero = y == 0
    assert np.all(ours[zero] == (127 if signed else 0))
    read = oracle.codebook(signed)[theirs[zero]]
    assert np.all(read == read[0])
    assert abs(read[0]) == pytest.approx(2.1e-5 if signed else 1.6e-5, rel=0.05)  # two digits on the page
