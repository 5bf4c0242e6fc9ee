"""Quantizes pieces with the blocks of the whole array (docs/algorithm.md, sections 3.3 and 9.1).

Where every piece has whole blocks, each process keeps the absmax of its own blocks.  Elsewhere all processes keep all
of the absmax, and a border may cut a block.  A piece is then filled up to whole blocks with the largest magnitude that
the block has over all processes, so that the codec finds the absmax of the whole block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_core.arrays.state_forms import COMPANDED, SLOTS, coded_shapes, moment_of
from automagic_core.config.constants import MIN_ABSMAX
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from automagic_torch.codec.stored import Key, States
from automagic_torch.sharding.exchange import largest
from automagic_torch.sharding.split import Split, piece_shape, state_splits


class ShardBlocks:
    """The blocks of one 8-bit state that have elements in this process's piece.

    Args:
        split: how the array is split.
        plan: the array's plan.
        name: of the state, which is split along the array's axis 0.

    Attributes:
        absmax_is_split: every process keeps the absmax of its own blocks only; no border cuts a block then.
        start, stop: the blocks, counted in the whole state.
        head, tail: how many elements fill up the first and the last block; 0 and 1 where the state is one block.
    """

    def __init__(self, split: Split, plan: StatePlan, name: str) -> None:
        self.block_size = plan.block_size
        shape = coded_shapes(plan)[name]
        self.size = math.prod(shape)
        self.slot, self.companded = SLOTS[moment_of(name)], moment_of(name) in COMPANDED
        absmax = state_splits(split, plan)[name + "_absmax"]
        self.absmax_is_split = absmax.split
        self._absmax_shape = piece_shape(absmax, split)
        piece = replace(split, shape=shape)
        self.first, self.count = piece.first, piece.stop - piece.first
        width = plan.block_size or self.size
        self.blocks = -(-self.size // width)
        self.start, self.stop = piece.first // width, -(-piece.stop // width)
        self.head, self.tail = 0, 1
        if plan.block_size is not None:
            self.head, self.tail = piece.first - self.start * width, self.stop * width - piece.stop

    def read(self, codes: Tensor, absmax: Tensor) -> Tensor:
        """Reads stacked pieces as float32, in the shape of `codes`.

        Args:
            codes: the pieces, stacked.
            absmax: as this process keeps it, stacked.
        """
        if self.count == 0:
            return codes.float()
        absmax, codes_here = absmax.reshape(len(codes), -1), codes.view(len(codes), -1)
        if not self.absmax_is_split:
            absmax = absmax[:, self.start : self.stop].contiguous()
            codes_here = self._filled(codes, codes.new_zeros(len(codes), self.stop - self.start))
        values = QuantizedTensor(codes_here, absmax, self.companded, self.block_size).read()
        return self._unfilled(values).reshape(codes.shape)

    def encoded(self, x: Tensor, maxima: Tensor | None, key: Key | None) -> tuple[Tensor, Tensor]:
        """Codes and absmax of stacked pieces.

        Args:
            x: float32 pieces, stacked.
            maxima: the largest magnitude of every block of the whole state; None where no border cuts a block.
            key: gives the keys of the random bits; None rounds to nearest.
        """
        codes, absmax = torch.zeros_like(x, dtype=torch.uint8), x.new_zeros(len(x), *self._absmax_shape)
        if self.count:
            filled = x.reshape(len(x), -1) if maxima is None else self._filled(x, maxima[:, self.start : self.stop])
            # The key is that of the first element, which may be a filling element.
            own_key = None if key is None else (key(self.slot, self.size) + self.first - self.head) % 2**32
            quantized = QuantizedTensor.write(filled, self.companded, self.block_size, own_key)
            codes = self._unfilled(quantized.codes).reshape(x.shape).contiguous()
            absmax = quantized.absmax.view(len(x), -1)
        if maxima is not None:
            absmax = maxima.sqrt() if self.companded else maxima
            absmax = absmax.masked_fill(absmax < MIN_ABSMAX, 0.0)
        return codes, absmax.view(len(x), *self._absmax_shape)

    def maxima(self, x: Tensor) -> Tensor:
        """The largest magnitude of every block in this piece, (arrays, blocks); 0 for blocks of other pieces."""
        maxima = x.new_zeros(len(x), self.blocks)
        if self.count:
            filled = self._filled(x, x.new_zeros(len(x), self.stop - self.start))
            maxima[:, self.start : self.stop] = filled.view(len(x), self.stop - self.start, -1).abs().amax(-1)
        return maxima

    def _filled(self, x: Tensor, of_blocks: Tensor) -> Tensor:
        """Fills pieces up to whole blocks, (arrays, elements), with the first and the last entry of `of_blocks`."""
        first = of_blocks[:, :1].expand(-1, self.head)
        last = of_blocks[:, -1:].expand(-1, self.tail)
        return torch.cat([first, x.reshape(len(x), -1), last], 1)

    def _unfilled(self, x: Tensor) -> Tensor:
        return x if self.absmax_is_split else x[:, self.head : self.head + self.count]


def encoded_pieces(pieces: Mapping[str, tuple[ShardBlocks, Tensor]], split: Split, key: Key | None) -> States:
    """Quantizes stacked pieces, with one exchange for all states that need one.

    Args:
        pieces: float32 pieces with their blocks, by the name of the state.
        split: how the arrays are split.
        key: gives the keys of the random bits; None rounds to nearest.
    """
    cut = [name for name, (blocks, _) in pieces.items() if not blocks.absmax_is_split]
    maxima = (
        dict(zip(cut, largest([pieces[name][0].maxima(pieces[name][1]) for name in cut], split), strict=True))
        if cut
        else {}
    )
    encoded: States = {}
    for name, (blocks, x) in pieces.items():
        encoded[name], encoded[name + "_absmax"] = blocks.encoded(x, maxima.get(name), key)
    return encoded
