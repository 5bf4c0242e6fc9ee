"""The tensors in `optimizer.state[p]`, and how they are read and stored (docs/algorithm.md, section 6.1).

Every tensor is contiguous in row-major order, whatever the memory format of its parameter is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_core import Slot, StatePlan
from automagic_core.arrays import state_forms as core_forms
from automagic_core.arrays.state_forms import COMPANDED, SCALARS, SLOTS, moment_of
from automagic_core.codec.blocks import Shape
from automagic_torch.codec.quantized_tensor import QuantizedTensor

States = dict[str, Tensor]
Key = Callable[[Slot, int], Any]
"""Gives the key of the random bits of a slot for whole, unsharded tensors of some size: section 3.7.  In a compiled
function a key is a tensor."""


class Form(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@lru_cache(maxsize=4096)
def state_forms(plan: StatePlan, warming: bool) -> dict[str, Form]:
    """Every stored tensor of an array by its name.

    Args:
        plan: says which states there are.
        warming: fewer than `warmup_steps` steps are over.
    """
    forms = core_forms.state_forms(plan, warming)
    return {name: Form(form.shape, getattr(torch, form.dtype)) for name, form in forms.items()}


def read_states(stored: States, plan: StatePlan) -> States:
    """Reads stacked states as float32.  The result must not be written into.

    Args:
        stored: all stored tensors of some arrays, stacked: (arrays, *form).
        plan: the plan of the arrays.

    Returns:
        8-bit states as float32, and scalars with the shape (arrays, 1, …, 1).  Integers stay
        integers.
    """
    values: States = {}
    for name, tensor in stored.items():
        absmax = stored.get(name + "_absmax")
        if absmax is not None:
            values[name] = QuantizedTensor(tensor, absmax, moment_of(name) in COMPANDED, plan.block_size).read()
        elif name in SCALARS:
            values[name] = tensor.view(-1, *[1] * len(plan.shape))
        elif not name.endswith("_absmax"):
            values[name] = tensor
    return values


def encoded_states(new: States, coded: Mapping[str, Shape], block_size: int | None, key: Key | None) -> States:
    """Brings stacked states into their stored form.

    Args:
        new: the states that change, as `read_states` returns them.
        coded: `coded_shapes` of the arrays' plan.
        block_size: of the plan; None for one block an array.
        key: gives the keys of the random bits; None rounds to nearest.
    """
    encoded: States = {}
    for name, value in new.items():
        if name in coded:
            moment = moment_of(name)
            bits = None if key is None else key(SLOTS[moment], math.prod(coded[name]))
            quantized = QuantizedTensor.write(value, moment in COMPANDED, block_size, bits)
            encoded[name], encoded[name + "_absmax"] = quantized.codes, quantized.absmax
        else:
            encoded[name] = value.view(-1) if name in SCALARS else value
    return encoded
