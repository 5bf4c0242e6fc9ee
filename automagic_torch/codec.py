"""The 8-bit codec of section 3: codes and block scales instead of float32.

bitsandbytes' own kernels find the nearest code and read codes back.  Around them stand what it does not do:
companding, stochastic rounding, blocks too small to divide by, and one block for a whole array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from automagic_core import absmax_shape, codebook_midpoints, dynamic_codebook
from automagic_core.constants import MIN_ABSMAX
from automagic_torch.random_bits import random_unit

try:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    BITSANDBYTES_AVAILABLE = True
except ImportError:
    BITSANDBYTES_AVAILABLE = False


@cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    return torch.from_numpy(dynamic_codebook(signed).copy()).to(device)


@cache
def _upper_midpoints(signed: bool, device: torch.device) -> Tensor:
    # Entry k is the midpoint above code k; there is none above the last.
    middle = torch.from_numpy(codebook_midpoints(signed).copy())
    return torch.cat([middle, torch.tensor([torch.inf])]).to(device)


@dataclass(frozen=True)
class QuantizedTensor:
    """A float32 array kept as 8-bit codes.

    Attributes:
        codes: uint8 in the array's shape, contiguous.
        absmax: float32, one scale per block, shape `automagic_core.absmax_shape`.
        companded: the square root is stored, with the unsigned codebook; only for arrays ≥ 0.
        block_size: elements per block, None for one block of the whole array.
    """

    codes: Tensor
    absmax: Tensor
    companded: bool
    block_size: int | None

    def read(self) -> Tensor:
        """The stored array: float32 in the shape of `codes`."""
        codebook = _codebook(not self.companded, self.codes.device)
        if self.block_size is None:
            values = codebook[self.codes.int()] * self.absmax.reshape(())
        else:
            values = dequantize_blockwise(
                self.codes, absmax=self.absmax.reshape(-1), code=codebook, blocksize=self.block_size
            )
        return values * values if self.companded else values

    @classmethod
    def write(cls, x: Tensor, companded: bool, block_size: int | None, key: int | None) -> QuantizedTensor:
        """Stores an array.

        Args:
            x: float32, at least one element.
            companded, block_size: as in the attributes.
            key: of the random numbers for stochastic rounding; None rounds to nearest.
        """
        values = (x.sqrt() if companded else x).contiguous()
        signed = not companded
        if block_size is None:
            codes, absmax = _nearest_one_block(values, signed)
        else:
            codes, absmax = _nearest_by_bitsandbytes(values, signed, block_size)
        width = block_size or values.numel()
        by_block = _in_blocks(codes, width)
        is_zero = absmax < MIN_ABSMAX
        if key is not None:
            y = _in_blocks(values, width) * torch.where(is_zero, 0.0, 1.0 / absmax)[:, None]
            r = random_unit(key, by_block.numel(), x.device).view_as(y)
            by_block = _moved_to_neighbour(y, by_block, _codebook(signed, x.device), r)
        by_block = by_block.masked_fill(is_zero[:, None], 0)
        return cls(
            codes=by_block.reshape(-1)[: values.numel()].reshape(x.shape),
            absmax=absmax.masked_fill(is_zero, 0.0).reshape(absmax_shape(tuple(x.shape), block_size)),
            companded=companded,
            block_size=block_size,
        )


def _nearest_by_bitsandbytes(values: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Its codes, in the shape of `values`, and its scales, of shape (blocks,)."""
    codes, state = quantize_blockwise(values, code=_codebook(signed, values.device), blocksize=block_size)
    return codes, state.absmax


def _nearest_one_block(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The exact rule, which bitsandbytes does not offer for a whole array as one block; scales of shape (1,)."""
    absmax = values.abs().amax().reshape(1)
    y = values * torch.where(absmax < MIN_ABSMAX, 0.0, 1.0 / absmax)
    midpoints = _upper_midpoints(signed, values.device)
    code = torch.bucketize(y, midpoints[:-1], out_int32=True)
    # bucketize gives a tie to the code below; it belongs to the even one.
    code = code + ((code % 2 == 1) & (y == midpoints[code]))
    return code.to(torch.uint8), absmax


def _moved_to_neighbour(y: Tensor, codes: Tensor, codebook: Tensor, r: Tensor) -> Tensor:
    """Stochastic rounding: to the neighbour on the far side of y with probability |error| / gap."""
    k = codes.int()
    error = y - codebook[k]
    neighbour = (k + error.sign().int()).clamp(0, 255)
    gap = (codebook[neighbour] - codebook[k]).abs()
    # Past the end of the map the neighbour is k itself, the quotient infinite; without an error it is NaN: both stay.
    move = r < error.abs() / gap
    return torch.where(move, neighbour, k).to(torch.uint8)


def _in_blocks(x: Tensor, width: int) -> Tensor:
    """(blocks, width) in row-major order, the last block filled up with zeros."""
    flat = x.reshape(-1)
    missing = -flat.numel() % width
    return (pad(flat, (0, missing)) if missing else flat).view(-1, width)
