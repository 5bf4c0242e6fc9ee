"""8-bit states of shards (section 3): blocks are those of the whole array, also where a border cuts them.

Where every piece has whole blocks, each process keeps the scales of its own.  Elsewhere all processes keep all scales,
and a piece is filled up to whole blocks with what is largest in the block over all processes: the codec, which finds
every block's scale itself, then finds that of the whole block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_core.config.constants import MIN_ABSMAX
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from automagic_torch.codec.stored import COMPANDED, SLOTS, States
from automagic_torch.sharding.exchange import largest
from automagic_torch.sharding.split import Split, piece_shape, places


class ShardBlocks:
    """The blocks that a piece has elements of.

    Attributes:
        scales_are_split: every process keeps the scales of its own blocks only; no block is cut then.
        start, stop: its blocks, counted in the whole array.
        head, tail: elements that fill up its first and its last block; where the array is one block, one behind it.
    """

    def __init__(self, split: Split, plan: StatePlan) -> None:
        self.split, self.block_size = split, plan.block_size
        self.count = split.stop - split.first
        place = places(split, plan)["exp_avg_absmax"]
        self.scales_are_split = place.split
        self._scales_shape = piece_shape(place, split)
        width = plan.block_size or plan.size
        self.blocks = -(-plan.size // width)
        self.start, self.stop = split.first // width, -(-split.stop // width)
        self.head, self.tail = 0, 1
        if plan.block_size is not None:
            self.head, self.tail = split.first - self.start * width, self.stop * width - split.stop

    def read(self, codes: Tensor, scales: Tensor, companded: bool) -> Tensor:
        """What is stored, float32 in the shape of `codes`.

        Args:
            codes: the pieces, stacked.
            scales: what this process keeps of them, stacked.
            companded: as in `QuantizedTensor`.
        """
        if self.count == 0:
            return codes.float()
        scales = scales.reshape(len(codes), -1)
        if not self.scales_are_split:
            scales = scales[:, self.start : self.stop].contiguous()
            codes_here = self._filled(codes, codes.new_zeros(len(codes), self.stop - self.start))
        else:
            codes_here = codes.view(len(codes), -1)
        values = QuantizedTensor(codes_here, scales, companded, self.block_size).read()
        return self._unfilled(values).reshape(codes.shape)

    def encoded(self, new: States, key: Callable[[Slot], int] | None) -> States:
        """8-bit states as this process keeps them.

        Args:
            new: by name, float32, the pieces, stacked.
            key: of the random bits of a slot, that of the piece's first element; None rounds to nearest.
        """
        if self.scales_are_split:
            return self._encoded_alone(new, key)
        maxima = largest([self._maxima(x) for x in new.values()], self.split)
        encoded: States = {}
        for (name, x), of_blocks in zip(new.items(), maxima, strict=True):
            companded = name in COMPANDED
            encoded[name] = torch.zeros_like(x, dtype=torch.uint8)
            if self.count:
                filled = self._filled(x, of_blocks[:, self.start : self.stop])
                # The filling in front has indices of its own.
                own_key = None if key is None else (key(SLOTS[name]) - self.head) % 2**32
                quantized = QuantizedTensor.write(filled, companded, self.block_size, own_key)
                encoded[name] = self._unfilled(quantized.codes).reshape(x.shape).contiguous()
            scales = of_blocks.sqrt() if companded else of_blocks
            encoded[name + "_absmax"] = scales.masked_fill(scales < MIN_ABSMAX, 0.0).view(len(x), *self._scales_shape)
        return encoded

    def _encoded_alone(self, new: States, key: Callable[[Slot], int] | None) -> States:
        encoded: States = {}
        for name, x in new.items():
            encoded[name] = torch.zeros_like(x, dtype=torch.uint8)
            encoded[name + "_absmax"] = x.new_zeros(len(x), *self._scales_shape)
            if self.count:
                flat = x.reshape(len(x), -1)
                quantized = QuantizedTensor.write(flat, name in COMPANDED, self.block_size, key and key(SLOTS[name]))
                encoded[name] = quantized.codes.view(x.shape)
                encoded[name + "_absmax"] = quantized.absmax.view(len(x), *self._scales_shape)
        return encoded

    def _maxima(self, x: Tensor) -> Tensor:
        """Of every block of the whole array, (arrays, blocks): the largest magnitude here, 0 for a block elsewhere."""
        maxima = x.new_zeros(len(x), self.blocks)
        if self.count:
            filled = self._filled(x, x.new_zeros(len(x), self.stop - self.start))
            of_blocks = filled.view(len(x), self.stop - self.start, -1).abs().amax(-1)
            maxima[:, self.start : self.stop] = of_blocks
        return maxima

    def _filled(self, x: Tensor, of_blocks: Tensor) -> Tensor:
        """(arrays, elements) of whole blocks; the filling has the values of the first and of the last block."""
        first = of_blocks[:, :1].expand(-1, self.head)
        last = of_blocks[:, -1:].expand(-1, self.tail)
        return torch.cat([first, x.reshape(len(x), -1), last], 1)

    def _unfilled(self, x: Tensor) -> Tensor:
        if self.scales_are_split:
            return x
        return x[:, self.head : self.head + self.count]
