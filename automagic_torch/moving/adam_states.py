"""Reads the moments that torch's, bitsandbytes' or torchao's Adam saved (docs/algorithm.md, section 10.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_core import MAX_STEP
from automagic_core.arrays.bias import weight_seen
from automagic_torch.arrays.dtensors import whole

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Newer bitsandbytes keeps its tensors in a dict of this name, to hide them from FSDP."""
_USED = {
    *("step", "exp_avg", "exp_avg_sq"),
    *("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"),
}


class AdamMoments(NamedTuple):
    """Adam's bias-corrected moments of one array after `age` steps.

    Attributes:
        age: number of Adam's steps, ≥ 1.
        m_hat, v_hat: float32 in the array's shape.
        others: names of unused entries.
    """

    age: int
    m_hat: Tensor
    v_hat: Tensor
    others: list[str]


def adam_moments(
    saved: Mapping[str, Any], shape: torch.Size, device: torch.device, betas: tuple[float, float], name: str
) -> AdamMoments | None:
    """Reads the moments of one array; None where Adam took no step.

    Args:
        saved: `exp_avg` and `exp_avg_sq`, or bitsandbytes' `state1` and `state2`.  The latter are uint8 codes with
            absmax (`absmax1`) and a codebook (`qmap1`), or floats.
        shape, device: of the parameter.
        betas: those of Adam.
        name: the parameter's name in errors.

    Raises:
        ValueError: an entry is missing, has another shape, or has values that no moment can have.
    """
    saved = {**saved, **saved.get(_WRAPPED, {})}
    saved.pop(_WRAPPED, None)
    if "step" not in saved:
        raise ValueError(f"Adam's state of {name} lacks step; it has {', '.join(map(str, saved)) or 'nothing'}")
    age = min(int(saved["step"]), MAX_STEP)
    if age < 1:
        return None
    of_bitsandbytes = "state1" in saved
    m = _moment(saved, "1" if of_bitsandbytes else "exp_avg", shape, device, name)
    v = _moment(saved, "2" if of_bitsandbytes else "exp_avg_sq", shape, device, name)
    if bool((v < 0).any()):
        raise ValueError(f"Adam's state of {name} has negative second moments")
    others = sorted(str(key) for key in saved if key not in _USED)
    return AdamMoments(age, m / weight_seen(betas[0], age), v / weight_seen(betas[1], age), others)


def _moment(saved: Mapping[str, Any], which: str, shape: torch.Size, device: torch.device, name: str) -> Tensor:
    """Reads one moment; `which` is torch's name, or the digit of bitsandbytes' name."""
    key = which if which.startswith("exp") else "state" + which
    value = saved.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"Adam's state of {name} lacks {key}; it has {', '.join(map(str, saved))}")
    if value.shape != shape:
        raise ValueError(f"Adam's state of {name} has {key} of shape {tuple(value.shape)}; valid: {tuple(shape)}")
    value = whole(value)
    if type(value) not in (Tensor, torch.nn.Parameter):  # torchao's states are tensors of classes of their own
        value = value.dequantize()
    if value.dtype == torch.uint8:
        value = _read_codes(value, saved.get("absmax" + which), saved.get("qmap" + which), key, name)
    value = value.detach().to(device, torch.float32)
    if not bool(value.isfinite().all()):
        raise ValueError(f"Adam's state of {name} has values in {key} that are not finite")
    return value


def _read_codes(codes: Tensor, absmax: Any, codebook: Any, key: str, name: str) -> Tensor:
    """codebook · absmax; the block size follows from the numbers of blocks and of elements."""
    digit = key[-1]
    if not isinstance(absmax, Tensor) or not isinstance(codebook, Tensor):
        raise ValueError(f"Adam's state of {name} has {key} in 8 bits without absmax{digit} and qmap{digit}")
    sizes = [2**k for k in range(6, 13)]
    fitting = [size for size in sizes if -(-codes.numel() // size) == absmax.numel()]
    if not fitting and absmax.numel() != 1:
        raise ValueError(
            f"Adam's state of {name} has {absmax.numel()} scales for {codes.numel()} elements; "
            f"valid: one for every block of {sizes[0]} to {sizes[-1]} elements, a power of two"
        )
    width = fitting[0] if fitting else codes.numel()
    per_element = absmax.to(codes.device).float().reshape(-1).repeat_interleave(width)[: codes.numel()]
    values = codebook.to(codes.device).float()[codes.reshape(-1).int()]
    return (values * per_element).view(codes.shape)
