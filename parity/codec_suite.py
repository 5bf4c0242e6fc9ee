"""The codec against bitsandbytes: codebooks, reading, rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterable

import bitsandbytes.functional as bnb
import jax.numpy as jnp
import numpy as np
import torch

from automagic_core import codebook_midpoints, dynamic_codebook
from automagic_optax import QuantizedArray, quantize
from parity.checks import Check
from parity.rules import rounding_rule

SUITE = "Codec"
GRID_REACH = 1 / 65535
"""Half a step of bitsandbytes' CPU grid over [−1, 1]: how far from a midpoint it can decide otherwise."""
CUDA_REACH = 2
"""Units in the last place: bitsandbytes' CUDA build uses fast math, so its reciprocal may be one off."""
CUDA_SHARE = 1e-5


def suite(device: str, size: int = 4_000_000) -> Iterable[Check]:
    """The checks of the report, on `size` random values of three distributions for either codebook."""
    for signed in (True, False):
        kind = "signed" if signed else "unsigned"
        theirs = bnb.create_dynamic_map(signed=signed).numpy()
        yield Check(SUITE, f"{kind}: codebook values that differ", _differing(dynamic_codebook(signed), theirs), 0)
        for block_size in (64, 256, 4096):
            yield from _one_block_size(device, signed, block_size, size, f"{kind}, blocks of {block_size}")


def _one_block_size(device: str, signed: bool, block_size: int, size: int, kind: str) -> Iterable[Check]:
    x = _values(signed, size)
    codebook = torch.from_numpy(dynamic_codebook(signed).copy()).to(device)
    codes, state = bnb.quantize_blockwise(torch.from_numpy(x).to(device), code=codebook, blocksize=block_size)
    read = bnb.dequantize_blockwise(codes, state).cpu().numpy()
    theirs, absmax = codes.cpu().numpy(), state.absmax.cpu().numpy()

    beside = quantize(jnp.asarray(x), signed=signed, block_size=block_size, rule=rounding_rule(device))
    ours = QuantizedArray(jnp.asarray(theirs), jnp.asarray(absmax), signed, block_size).dequantize()
    yield Check(SUITE, f"{kind}: values read that differ", _differing(np.asarray(ours), read), 0)
    yield Check(SUITE, f"{kind}: scales that differ", _differing(np.asarray(beside.absmax), absmax), 0)

    exact = np.asarray(quantize(jnp.asarray(x), signed=signed, block_size=block_size).codes)
    y = x * (np.float32(1) / np.repeat(absmax, block_size)[: x.size])
    if device == "cpu":
        yield Check(SUITE, f"{kind}: codes off the grid rule", _differing(np.asarray(beside.codes), theirs), 0)
        differ = exact != theirs
        unexplained = differ & (_distance_to_midpoint(y, signed) > GRID_REACH)
        counted = f"{kind}: of {int(differ.sum()):,} codes ({differ.mean():.1%}) off the exact rule"
        yield Check(SUITE, f"{counted}, not within 1/65,535 of a midpoint", int(unexplained.sum()), 0)
    else:
        differ = exact != theirs
        ulps = _distance_to_midpoint(y, signed) / np.spacing(np.abs(y))
        yield Check(SUITE, f"{kind}: share of codes that differ", float(differ.mean()), CUDA_SHARE)
        yield Check(SUITE, f"{kind}: codes apart", int(np.abs(exact.astype(int) - theirs)[differ].max(initial=0)), 1)
        yield Check(SUITE, f"{kind}: of these over 2 ulp from a midpoint", int((differ & (ulps > CUDA_REACH)).sum()), 0)


def _values(signed: bool, size: int) -> np.ndarray:
    rng = np.random.default_rng(int(signed))
    third = size // 3
    spread = np.exp(2 * rng.standard_normal(third)) * rng.standard_normal(third)
    x = np.concatenate([rng.standard_normal(third), rng.uniform(-1, 1, size - 2 * third), spread]).astype(np.float32)
    return x if signed else np.abs(x)


def _distance_to_midpoint(y: np.ndarray, signed: bool) -> np.ndarray:
    midpoints = codebook_midpoints(signed).astype(np.float64)
    above = np.clip(np.searchsorted(midpoints, y), 1, len(midpoints) - 1)
    return np.minimum(np.abs(y - midpoints[above]), np.abs(y - midpoints[above - 1]))


def _differing(a: np.ndarray, b: np.ndarray) -> int:
    kind = {1: np.uint8, 4: np.uint32}[a.dtype.itemsize]
    return int((a.reshape(-1).view(kind) != b.reshape(-1).view(kind)).sum())
