"""The 8-bit codec: codes and one absmax per block instead of float32 (docs/algorithm.md, section 3).

bitsandbytes finds the nearest codes and reads codes.  This module adds what bitsandbytes lacks: companding, stochastic
rounding, blocks of zeros, and one block for a whole array.  In a compiled function codes are looked up in tables, so
that a compiler can make one loop of all that is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from automagic_core import absmax_shape, codebook_midpoints, dynamic_codebook
from automagic_core.config.constants import MIN_ABSMAX
from automagic_torch.codec.kept_tensors import kept_tensor
from automagic_torch.codec.nearest import codes_of, tables
from automagic_torch.codec.random_bits import random_unit

try:
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    BITSANDBYTES_AVAILABLE = True
    """bitsandbytes can be imported, so states can have 8 bits; otherwise they have 32."""
except ImportError:
    BITSANDBYTES_AVAILABLE = False


@kept_tensor
def _codebook(signed: bool, device: torch.device) -> Tensor:
    return torch.from_numpy(dynamic_codebook(signed).copy()).to(device)


@kept_tensor
def _upper_midpoints(signed: bool, device: torch.device) -> Tensor:
    # Entry k is the midpoint above code k, and infinity above the last code.
    middle = torch.from_numpy(codebook_midpoints(signed).copy())
    return pad(middle, (0, 1), value=torch.inf).to(device)


@dataclass(frozen=True)
class QuantizedTensor:
    """Stacked arrays in 8 bits; every array has blocks of its own.

    Attributes:
        codes: uint8, (arrays, *shape), contiguous.
        absmax: float32, (arrays, *`automagic_core.absmax_shape`).
        companded: the square root is stored, with the unsigned codebook; only for arrays ≥ 0.
        block_size: elements per block; None where each array is one block.
    """

    codes: Tensor
    absmax: Tensor
    companded: bool
    block_size: int | None

    def read(self) -> Tensor:
        """Reads the arrays as float32 in the shape of `codes`, a new tensor."""
        width = self.block_size or self.codes[0].numel()
        if torch.compiler.is_compiling():
            codebook = tables(not self.companded, self.codes.device).codebook
            values = codebook[self.codes.int()] * _for_elements(self.absmax, self.codes, width)
            return values * values if self.companded else values
        codes = _whole_blocks(self.codes, width)
        absmax = self.absmax.reshape(-1)
        codebook = _codebook(not self.companded, self.codes.device)
        if self.block_size is None:
            values = codebook.index_select(0, codes.reshape(-1).int()).view(-1, width).mul_(absmax[:, None])
        else:
            values = dequantize_blockwise(codes, absmax=absmax, code=codebook, blocksize=width)
        values = _without_padding(values, self.codes)
        return values.mul_(values) if self.companded else values

    @classmethod
    def write(cls, x: Tensor, companded: bool, block_size: int | None, key: int | Tensor | None) -> QuantizedTensor:
        """Stores arrays.

        Args:
            x: float32, (arrays, *shape), at least one element.
            companded, block_size: as in the attributes.
            key: the key of the random bits, which all arrays share; None rounds to nearest.
        """
        shape = tuple(x.shape[1:])
        width = block_size or x[0].numel()
        values = x.sqrt() if companded else x.contiguous()
        signed = not companded
        if torch.compiler.is_compiling():
            codes, absmax, is_zero = _by_tables(values, signed, width, key)
        else:
            values = _whole_blocks(values, width)
            r = None if key is None else random_unit(key, values[0].numel(), x.device)
            codes, absmax, is_zero = _by_bitsandbytes(values, signed, block_size, r)
            codes = _without_padding(codes, x)
        return cls(
            codes=codes,
            absmax=absmax.masked_fill(is_zero, 0.0).view(len(x), *absmax_shape(shape, block_size)),
            companded=companded,
            block_size=block_size,
        )


def _by_tables(x: Tensor, signed: bool, width: int, key: int | Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in the shape of x, the absmax of every block, and which blocks are zeros, (arrays, blocks)."""
    absmax = _whole_blocks(x, width).view(len(x), -1, width).abs().amax(-1)
    is_zero = absmax < MIN_ABSMAX
    y = x * _for_elements(torch.where(is_zero, 0.0, absmax.reciprocal()), x, width)
    r = None if key is None else random_unit(key, x[0].numel(), x.device).view(x.shape[1:])
    codes = torch.where(_for_elements(is_zero, x, width), 0, codes_of(y, signed, r))
    return codes.to(torch.uint8), absmax, is_zero


def _for_elements(of_blocks: Tensor, like: Tensor, width: int) -> Tensor:
    """A value of every block for each of its elements, in the shape of `like`."""
    size = like[0].numel()
    if like.device.type == "cpu" and size > width and size % width:
        # On a CPU Inductor makes of an index that is divided a loop over whole blocks, and leaves out what comes after
        # the last one.  It does not do so with a shift.
        block = torch.arange(size, device=like.device) >> (width.bit_length() - 1)
        return of_blocks.reshape(len(like), -1)[:, block].view(like.shape)
    blocks = of_blocks.reshape(len(like), -1, 1).expand(-1, -1, width)
    return blocks.reshape(len(like), -1)[:, :size].view(like.shape)


def _by_bitsandbytes(
    values: Tensor, signed: bool, block_size: int | None, r: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, the absmax, and which blocks are zeros, with one array in every row of `values`."""
    if block_size is None:
        codes, absmax = _nearest_one_block(values, signed)
    else:
        codes, absmax = _nearest_by_bitsandbytes(values, signed, block_size)
    is_zero = absmax < MIN_ABSMAX
    if r is not None:
        inverse = absmax.reciprocal().masked_fill_(is_zero, 0.0)
        y = values.view(len(absmax), -1) * inverse[:, None]
        codes = _moved_to_neighbour(y.view_as(values), codes, _codebook(signed, values.device), r)
    return codes.view(len(absmax), -1) * (~is_zero).view(torch.uint8)[:, None], absmax, is_zero


def _nearest_by_bitsandbytes(values: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """The nearest codes by bitsandbytes, in the shape of `values`, and the absmax, (blocks,)."""
    codes, state = quantize_blockwise(values, code=_codebook(signed, values.device), blocksize=block_size)
    return codes, state.absmax


def _nearest_one_block(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest codes where every row of `values` is one block, which bitsandbytes cannot do."""
    absmax = values.abs().amax(1)
    y = values * torch.where(absmax < MIN_ABSMAX, 0.0, 1.0 / absmax)[:, None]
    midpoints = _upper_midpoints(signed, values.device)
    code = torch.bucketize(y, midpoints[:-1], out_int32=True)
    # bucketize decides a tie for the lower code; the rule is the even one.
    code = code + ((code % 2 == 1) & (y == midpoints[code]))
    return code.to(torch.uint8), absmax


def _moved_to_neighbour(y: Tensor, codes: Tensor, codebook: Tensor, r: Tensor) -> Tensor:
    """Rounds stochastically: moves a code to the neighbour on the side of y with probability |error| / gap."""
    # With infinities beyond its ends, the quotient there is 0 and the code stays.
    extended = pad(pad(codebook, (1, 0), value=-torch.inf), (0, 1), value=torch.inf)
    index = codes.int().add_(1)
    value = extended.index_select(0, index.view(-1)).view_as(y)
    error = y.sub_(value)
    side = error.sign().to(torch.int8)
    neighbour = extended.index_select(0, index.add_(side).view(-1)).view_as(y)
    # Error and gap have the same sign.  If the error is 0, the quotient is NaN and the code stays.
    move = r < error.div_(neighbour.sub_(value))
    return codes.view(torch.int8).add(side.mul_(move.view(torch.int8))).view(torch.uint8)


def _whole_blocks(x: Tensor, width: int) -> Tensor:
    """Flattens arrays to (arrays, elements) in row-major order, and fills their last blocks up with zeros."""
    flat = x.reshape(len(x), -1)
    missing = -flat.shape[1] % width
    return pad(flat, (0, missing)) if missing else flat


def _without_padding(blocks: Tensor, like: Tensor) -> Tensor:
    """Undoes `_whole_blocks`: the elements in the shape of `like`, contiguous."""
    return blocks.view(len(like), -1)[:, : like[0].numel()].reshape(like.shape).contiguous()
