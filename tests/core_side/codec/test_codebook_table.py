"""The shipped codebooks are bitsandbytes' own, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from bitsandbytes.functional import create_dynamic_map

from automagic_core import codebook_midpoints, dynamic_codebook


@pytest.mark.parametrize("signed", [True, False])
def test_equals_bitsandbytes_bit_for_bit(signed: bool) -> None:
    theirs = create_dynamic_map(signed=signed).numpy()
    ours = dynamic_codebook(signed)
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == (256,)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(("signed", "zero", "first"), [(True, 127, -0.993), (False, 0, 0.0)])
def test_shape_of_the_map(signed: bool, zero: int, first: float) -> None:
    values = dynamic_codebook(signed)
    assert np.all(np.diff(values) > 0)
    assert values[zero] == 0
    assert not np.signbit(values[zero])
    assert values[255] == 1
    assert values[0] == pytest.approx(first, abs=1e-3)  # the page gives three digits
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


@pytest.mark.parametrize("signed", [True, False])
def test_midpoints_are_float32_halves_of_float32_sums(signed: bool) -> None:
    values, middle = dynamic_codebook(signed), codebook_midpoints(signed)
    assert middle.dtype == np.float32
    assert middle.shape == (255,)
    for k in range(255):
        assert middle[k] == np.float32(0.5) * np.float32(values[k] + values[k + 1])
    assert np.all(middle > values[:-1])
    assert np.all(middle < values[1:])
