"""What compiled loops on a CPU share: kept in memory, and as exact as in eager code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from automagic_core import decay
from automagic_torch.arrays.averages import one_minus_power
from automagic_torch.steps.kept_values import KeepSharedValues
from tests.torch_side.torch_helpers import TOO_OLD_TO_COMPILE

pytestmark = pytest.mark.skipif(TOO_OLD_TO_COMPILE, reason="the step is eager before torch 2.9")
SLOPE = 3.0


def scaled(of_rows: Tensor, x: Tensor) -> Tensor:
    return x * torch.erf(of_rows * SLOPE) + of_rows


def loops_around(function: str, source: str) -> int:
    """How many loops are open in generated C++ where a function is called for the first time."""
    lines = source[: source.index(function)].splitlines()
    indent = len(lines[-1]) - len(lines[-1].lstrip())
    loops = 0
    for line in reversed(lines):
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth < indent:
            indent = depth
        if line.strip().startswith("for(") and depth <= indent:
            loops += 1
    return loops


def test_what_a_loop_reads_for_each_element_is_computed_before_it() -> None:
    of_rows, x = torch.linspace(-1, 1, 6)[:, None], torch.linspace(-3, 3, 6 * 64).view(6, 64)
    found = {}
    options: dict[str, dict[str, Any]] = {"without": {}, "with": {"post_grad_custom_pre_pass": KeepSharedValues()}}
    for name, given in options.items():
        torch._dynamo.reset()
        y, (source, *_) = run_and_get_code(torch.compile(scaled, options=given, fullgraph=True), of_rows, x)
        torch.testing.assert_close(y, scaled(of_rows, x), rtol=1e-6, atol=1e-6)
        found[name] = loops_around("erf(", source)
    assert found == {"without": 2, "with": 1}


def test_the_bias_correction_of_many_arrays_is_exact() -> None:
    age = torch.arange(1.0, 65.0)
    decays = [decay(beta) for beta in (0.9, 0.999, 0.999999)]
    compiled = torch.compile(lambda age: [one_minus_power(each, age) for each in decays], fullgraph=True)
    for each, found in zip(decays, compiled(age), strict=True):
        # Of 1 − βᵃ one rounding of the result, and that of a · log β.
        torch.testing.assert_close(found.double(), -torch.expm1(age.double() * each.log), rtol=1.5e-7, atol=0)
