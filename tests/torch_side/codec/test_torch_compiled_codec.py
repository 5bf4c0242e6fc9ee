"""The codec as `torch.compile` compiles it, beside the numpy codec of the core (docs/algorithm.md, section 3)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from automagic_core import codebook_midpoints, dynamic_codebook
from automagic_core.codec import numpy_codec
from automagic_core.codec.random_bits import random_unit, rounding_key
from automagic_torch.codec.nearest import codes_of, prepare_tables
from automagic_torch.codec.quantized_tensor import QuantizedTensor
from automagic_torch.codec.random_bits import signed_key
from tests.torch_side.torch_helpers import TOO_OLD_TO_COMPILE

SIZES = (40, 300, 512, 1000)
"""Less than a block of 256, a block and a part, whole blocks, and several blocks and a part."""


@pytest.mark.skipif(TOO_OLD_TO_COMPILE, reason="the step is eager before torch 2.9")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("signed", [True, False])
def test_every_element_of_every_block(signed: bool, count: int) -> None:
    prepare_tables(torch.device("cpu"))

    def written_and_read(arrays: list[Tensor], key: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        written = [QuantizedTensor.write(x, not signed, 256, key) for x in arrays]
        return [(q.codes, q.absmax, q.read()) for q in written]

    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randn((count, size), generator=generator) for size in SIZES]
    arrays = arrays if signed else [x.square() for x in arrays]
    key = rounding_key(3, 1, 1000)
    compiled = torch.compile(written_and_read, fullgraph=True, dynamic=False)
    of_key = torch.full((), signed_key(key), dtype=torch.int32)
    for x, (codes, absmax, read) in zip(arrays, compiled(arrays, of_key), strict=True):
        for index in range(count):
            root = x[index].numpy() if signed else x[index].sqrt().numpy()
            random = random_unit(3, 1, 1000, np.arange(x.shape[1]))
            expected, largest = numpy_codec.encode(root, signed, 256, random)
            apart = np.abs(codes[index].numpy().astype(int) - expected)
            assert apart.max() <= 1
            assert apart.mean() < 0.01  # where a last bit of y decides a chance
            np.testing.assert_array_equal(absmax[index].numpy(), largest)
            values = numpy_codec.decode(codes[index].numpy(), largest, signed, 256)
            np.testing.assert_array_equal(read[index].numpy(), values if signed else values * values)


def test_tables_give_the_nearest_code_at_every_border() -> None:
    prepare_tables(torch.device("cpu"))
    for signed in (True, False):
        middle, values = (torch.from_numpy(f(signed).copy()) for f in (codebook_midpoints, dynamic_codebook))
        borders = torch.cat([middle, values])
        y = torch.cat([borders, *(torch.nextafter(borders, torch.full_like(borders, to)) for to in (-2.0, 2.0))])
        y = torch.cat([y, torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.2])
        y = y.clamp(-1.0 if signed else 0.0, 1.0)
        assert torch.equal(codes_of(y, signed, None), torch.from_numpy(numpy_codec._nearest(y.numpy(), signed)).int())
        r = torch.rand(len(y), generator=torch.Generator().manual_seed(1))
        nearest = numpy_codec._nearest(y.numpy(), signed)
        moved = numpy_codec._moved_to_neighbour(y.numpy(), nearest, signed, r.numpy())
        assert torch.equal(codes_of(y, signed, r), torch.from_numpy(moved).int())
