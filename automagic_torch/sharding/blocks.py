"""Quantizes pieces with the blocks of the whole array (docs/algorithm.md, sections 3.3 and 9.1).

Where every piece has whole blocks, each process keeps the absmax of its own blocks.  Elsewhere all processes keep all
of the absmax, and a border may cut a block.  A piece is then filled up to whole blocks with the largest magnitude that
the block has over all processes, so that the codec finds the absmax of the whole block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_core.arrays.state_forms import COMPANDED, SLOTS
from automagic_core.config.constants import MIN_ABSMAX
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from automagic_torch.codec.stored import States
from automagic_torch.sharding.exchange import largest
from automagic_torch.sharding.split import Split, piece_shape, state_splits


class ShardBlocks:
    """The blocks that have elements in this process's piece.

    Attributes:
        absmax_is_split: every process keeps the absmax of its own blocks only; no border cuts a block then.
        start, stop: the blocks, counted in the whole array.
        head, tail: how many elements fill up the first and the last block; 0 and 1 where the array is one block.
    """

    def __init__(self, split: Split, plan: StatePlan) -> None:
        self.split, self.block_size = split, plan.block_size
        self.count = split.stop - split.first
        absmax = state_splits(split, plan)["exp_avg_absmax"]
        self.absmax_is_split = absmax.split
        self._absmax_shape = piece_shape(absmax, split)
        width = plan.block_size or plan.size
        self.blocks = -(-plan.size // width)
        self.start, self.stop = split.first // width, -(-split.stop // width)
        self.head, self.tail = 0, 1
        if plan.block_size is not None:
            self.head, self.tail = split.first - self.start * width, self.stop * width - split.stop

    def read(self, codes: Tensor, absmax: Tensor, companded: bool) -> Tensor:
        """Reads stacked pieces as float32, in the shape of `codes`.

        Args:
            codes: the pieces, stacked.
            absmax: as this process keeps it, stacked.
            companded: as in `QuantizedTensor`.
        """
        if self.count == 0:
            return codes.float()
        absmax, codes_here = absmax.reshape(len(codes), -1), codes.view(len(codes), -1)
        if not self.absmax_is_split:
            absmax = absmax[:, self.start : self.stop].contiguous()
            codes_here = self._filled(codes, codes.new_zeros(len(codes), self.stop - self.start))
        values = QuantizedTensor(codes_here, absmax, companded, self.block_size).read()
        return self._unfilled(values).reshape(codes.shape)

    def encoded(self, new: States, key: Callable[[Slot], int] | None) -> States:
        """Quantizes stacked pieces.

        Args:
            new: float32 pieces by the name of the state, stacked.
            key: gives the key of a slot's random bits at the piece's first element; None rounds to nearest.
        """
        if self.absmax_is_split:
            return self._encoded_alone(new, key)
        maxima = largest([self._maxima(x) for x in new.values()], self.split)
        encoded: States = {}
        for (name, x), of_blocks in zip(new.items(), maxima, strict=True):
            companded = name in COMPANDED
            encoded[name] = torch.zeros_like(x, dtype=torch.uint8)
            if self.count:
                filled = self._filled(x, of_blocks[:, self.start : self.stop])
                # The key is that of the first element, which is a filling element.
                own_key = None if key is None else (key(SLOTS[name]) - self.head) % 2**32
                quantized = QuantizedTensor.write(filled, companded, self.block_size, own_key)
                encoded[name] = self._unfilled(quantized.codes).reshape(x.shape).contiguous()
            absmax = of_blocks.sqrt() if companded else of_blocks
            encoded[name + "_absmax"] = absmax.masked_fill(absmax < MIN_ABSMAX, 0.0).view(len(x), *self._absmax_shape)
        return encoded

    def _encoded_alone(self, new: States, key: Callable[[Slot], int] | None) -> States:
        encoded: States = {}
        for name, x in new.items():
            encoded[name] = torch.zeros_like(x, dtype=torch.uint8)
            encoded[name + "_absmax"] = x.new_zeros(len(x), *self._absmax_shape)
            if self.count:
                flat = x.reshape(len(x), -1)
                quantized = QuantizedTensor.write(flat, name in COMPANDED, self.block_size, key and key(SLOTS[name]))
                encoded[name] = quantized.codes.view(x.shape)
                encoded[name + "_absmax"] = quantized.absmax.view(len(x), *self._absmax_shape)
        return encoded

    def _maxima(self, x: Tensor) -> Tensor:
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
