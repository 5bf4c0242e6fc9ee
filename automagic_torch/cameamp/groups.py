"""The fields of a parameter group: defaults, profiles and checks (docs/algorithm.md, section 7)."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from automagic_core import FIELD_NAMES, PROFILES, Config, StatePlan, check_layout, check_names, state_plan
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.arrays.marks import is_embedding
from automagic_torch.cameamp.round_to_parameters import SUPPORTED_DTYPES
from automagic_torch.codec import quantized_tensor

OTHER_KEYS = ("params", "param_names", "name", "initial_lr")
"""Keys of a new group that are no fields: those of torch and of its schedulers."""


def default_fields(lr: Any, layout: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer: all fields of `Config`, and the layout.

    Raises:
        ValueError: an unknown name, a value outside its range, or a schedule as `lr`.
    """
    check_layout(layout)
    _refuse_schedule(lr)
    config = Config(lr=lr, **fields)
    return {**_plain(config.__dict__), "layout": layout}


def group_fields(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new group: its own fields win over its profile, which wins over the optimizer's defaults.

    Raises:
        ValueError: as in `default_fields`.
    """
    own = {name: value for name, value in group.items() if name not in OTHER_KEYS}
    layout = own.pop("layout", defaults["layout"])
    check_names(own)
    Config(profile=own.get("profile"))
    profile = PROFILES.get(own.get("profile") or "", {})
    inherited = {name: defaults[name] for name in FIELD_NAMES}
    merged = {**inherited, **profile, **own}
    return default_fields(merged.pop("lr"), layout, merged)


def group_config(group: Mapping[str, Any]) -> Config:
    """The present hyperparameters of a group, as an object that must not be changed.

    Its `lr` is `min_lr`, because a scheduler may set ``group["lr"]`` to any value.

    Raises:
        ValueError: a field was set to a value outside its range.
    """
    values = [group["min_lr"] if name == "lr" else group[name] for name in FIELD_NAMES]
    try:
        return _known_config(*values)
    except TypeError:  # a value without a hash, such as a list
        return Config(**dict(zip(FIELD_NAMES, values, strict=True)))


@lru_cache(maxsize=256, typed=True)
def _known_config(*values: Any) -> Config:
    # Cached, since the check of 33 fields takes as long as the update of a small array.
    return Config(**dict(zip(FIELD_NAMES, values, strict=True)))


def plan_of(p: Tensor, config: Config, layout: Any, *, eight_bit: bool) -> StatePlan:
    """The plan of a parameter's states."""
    return state_plan(tuple(p.shape), config, layout, embedding=is_embedding(p), eight_bit=eight_bit)


def can_store_8bit(p: Tensor, config: Config) -> bool:
    """Whether the device of p may hold 8-bit states."""
    return quantized_tensor.BITSANDBYTES_AVAILABLE and (p.is_cuda or config.force_8bit)


def reason_for_32_bits(p: Tensor) -> str:
    """Why p has 32-bit states where `can_store_8bit` is False."""
    if not quantized_tensor.BITSANDBYTES_AVAILABLE:
        return "bitsandbytes is not installed"
    return f"the parameters are on {p.device.type}; force_8bit=True stores 8 bits there too"


def device_of(group: Mapping[str, Any]) -> torch.device:
    """Where the tensors of a group are kept: with its first parameter."""
    return group["params"][0].device if group["params"] else torch.device("cpu")


def parameter_name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """The name of a parameter in error messages."""
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"parameter {index} of group {group_index} (shape {tuple(group['params'][index].shape)})"


def refuse_dtypes(group: Mapping[str, Any], group_index: int) -> None:
    """Raises a ValueError that names the first parameter of a dtype that cannot be optimized."""
    for index, p in enumerate(group["params"]):
        if p.dtype not in SUPPORTED_DTYPES:
            valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            name = parameter_name(group, group_index, index)
            raise ValueError(f"{name} has dtype {str(p.dtype).removeprefix('torch.')}; valid: {valid}")


def refuse_placements(group: Mapping[str, Any], group_index: int) -> None:
    """Raises a ValueError that names the first DTensor with placements that are not supported."""
    for index, p in enumerate(group["params"]):
        if is_dtensor(p):
            from automagic_torch.sharding.split import split_of

            try:
                split_of(p)
            except ValueError as error:
                raise ValueError(f"{parameter_name(group, group_index, index)}: {error}") from error


def refuse_sparse(group: Mapping[str, Any], group_index: int) -> None:
    """Raises a RuntimeError that names the first parameter with a sparse gradient."""
    for index, p in enumerate(group["params"]):
        if p.grad is not None and p.grad.layout != torch.strided:
            name = parameter_name(group, group_index, index)
            raise RuntimeError(f"{name} has a sparse gradient; only dense gradients can be used")


def _refuse_schedule(lr: Any) -> None:
    if callable(lr) and not isinstance(lr, Tensor):
        raise ValueError(
            f"lr = {lr!r} is a schedule; give a number and put the schedule into torch.optim.lr_scheduler.LambdaLR"
        )


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numpy's numbers, which ``torch.load(weights_only=True)`` would refuse, by Python's."""
    return {name: _plain_value(value) for name, value in fields.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, (bool, Tensor, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain_value(v) for v in value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value
