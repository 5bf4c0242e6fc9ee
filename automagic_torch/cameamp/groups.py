"""The fields of a parameter group: defaults, profiles and checks (docs/algorithm.md, section 7)."""

from __future__ import annotations

import difflib
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from automagic_core import FIELD_NAMES, PROFILES, Config, StatePlan, check_layout, state_plan
from automagic_core.arrays.group_keys import LAYOUT, OWN_KEYS, PLAIN, PREFIX, ParameterGroup, fields_of
from automagic_core.arrays.state_forms import own_states
from automagic_core.config.ranges import known
from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.arrays.marks import is_embedding
from automagic_torch.cameamp.round_to_parameters import SUPPORTED_DTYPES
from automagic_torch.codec import quantized_tensor

_NO_SUCH_WAY = {
    "foreach": "arrays of one kind are always computed together",
    "fused": "arrays of one kind are always computed together",
    "capturable": "a step counts on the host, so run it outside of a CUDA graph",
    "differentiable": "no gradient flows through a step",
    "maximize": "a step always descends, so negate the loss",
}
"""Keywords of torch's optimizers that decide how a step is done, and what holds here."""
_FIELD_KEYS = tuple(OWN_KEYS[name] for name in FIELD_NAMES)
_NAMES = {key: name for name, key in OWN_KEYS.items() if key != name}
_OWN = frozenset(OWN_KEYS.values())
_LIMIT = OWN_KEYS["min_lr"]
_BETAS = OWN_KEYS["betas"]
_NEARLY_THE_NAME = 0.85


def _refuse_ways(fields: Mapping[str, Any]) -> None:
    """Raises a ValueError that says what holds instead of a keyword of torch's optimizers."""
    for name, instead in _NO_SUCH_WAY.items():
        if fields.get(name):
            raise ValueError(f"{name} = {fields[name]!r} is not an option of this optimizer: {instead}")


def default_fields(lr: Any, layout: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer, by their keys in a group: all fields of `Config`, the layout, and `betas`.

    `betas` is there a second time without the prefix: ``OneCycleLR`` and ``CyclicLR`` look for it, and may write into
    it what nobody reads.

    Raises:
        ValueError: an unknown name, a value outside its range, or a schedule as `lr`.
    """
    _refuse_ways(fields)
    # Code that copies an optimizer gives its `defaults` back.
    of_defaults = {_NAMES[key]: value for key, value in fields.items() if key in _NAMES}
    plain_fields = {name: value for name, value in fields.items() if name not in _NAMES and name not in _NO_SUCH_WAY}
    fields = of_defaults | plain_fields
    layout = fields.pop("layout", layout)
    check_layout(layout)
    _refuse_schedule(lr)
    # Training begins when a rate is set, so 0 need not lie between the limits.
    rests = isinstance(lr, numbers.Real) and not isinstance(lr, bool) and lr == 0
    config = Config(lr=fields.get("min_lr", Config.min_lr) if rests else lr, **fields)
    plain = _plain(config.__dict__) | ({"lr": 0.0} if rests else {})
    return {OWN_KEYS[name]: value for name, value in plain.items()} | {LAYOUT: layout, "betas": plain["betas"]}


def group_fields(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a new group: its own fields win over its profile, which wins over the optimizer's defaults.

    A group names its fields as the constructor does; one that was another optimizer's group has them by their keys.
    Any other entry is somebody else's and stays as it is.

    Raises:
        ValueError: a value outside its range, or a schedule as `lr`.
    """
    own = {name: group[name] for name in (*FIELD_NAMES, "layout") if name in group}
    own |= {name: group[OWN_KEYS[name]] for name in (*FIELD_NAMES, "layout") if OWN_KEYS[name] in group}
    layout = own.pop("layout", defaults[LAYOUT])
    Config(profile=own.get("profile"))
    profile = PROFILES.get(own.get("profile") or "", {})
    merged = {**fields_of(defaults), **profile, **own}
    return default_fields(merged.pop("lr"), layout, merged)


def as_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> ParameterGroup:
    """The group as the optimizer keeps it: its fields by their keys, and the entries of others.

    Raises:
        ValueError: as `group_fields`.
    """
    _refuse_ways(group)
    fields = group_fields(group, defaults)
    others = {key: value for key, value in group.items() if key not in FIELD_NAMES and key != "layout"}
    for key in others:
        _warn_if_nearly_a_field(key)
    return ParameterGroup(others | fields)


def group_config(group: Mapping[str, Any]) -> Config:
    """The present hyperparameters of a group, as an object that must not be changed.

    Its `lr` is `min_lr`, because a scheduler may set ``group["lr"]`` to any value.

    Raises:
        ValueError: a field was set to a value outside its range.
    """
    values = [group[_LIMIT if key == "lr" else key] for key in _FIELD_KEYS]
    try:
        return _known_config(*values)
    except TypeError:  # a value without a hash, such as a list
        return Config(**dict(zip(FIELD_NAMES, values, strict=True)))


def group_device(group: Mapping[str, Any]) -> torch.device:
    """Where the tensors of a group lie: with its first trained parameter; on the meta device only if it steps there."""
    for p in group["params"]:
        if p.grad is not None or (p.requires_grad and not p.is_meta):
            return torch.device(p.device)
    return next((torch.device(p.device) for p in group["params"] if not p.is_meta), torch.device("cpu"))


_OF_SCHEDULERS = ("min_lr", "max_lr")
"""Where OneCycleLR keeps rates of its own."""


def unused_entries(group: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was written into a group and is not used: its name, and a sentence about it."""
    lr = group["lr"]
    if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:  # one on a device is not waited for
        yield "lr", f"a group's lr was set to {lr!r}, which counts as 0"
    if _plain_value(group.get("betas", group[_BETAS])) != group[_BETAS]:
        yield "betas", "group['betas'] differs from group['automagic_betas'], which alone is read"
    of_scheduler = _OF_SCHEDULERS if all(name in group for name in ("initial_lr", *_OF_SCHEDULERS)) else ()
    for name in FIELD_NAMES:
        if name not in group or name in (*PLAIN, "betas", *of_scheduler):
            continue
        # Code that hands fields on as an optimizer's defaults leaves them in the groups, too.
        if _plain_value(group[name]) != group[OWN_KEYS[name]]:
            yield name, f"group[{name!r}] is not read; the field is group[{OWN_KEYS[name]!r}]"
    for name in group.keys() & _NO_SUCH_WAY.keys():
        if group[name]:
            yield name, f"group[{name!r}] is not read: {_NO_SUCH_WAY[name]}"
    for key in group.keys() - _OWN:
        if str(key).startswith(PREFIX):
            near = difflib.get_close_matches(key.removeprefix(PREFIX), FIELD_NAMES, n=1)
            hint = f"; did you mean {PREFIX + near[0]!r}?" if near else ""
            yield key, f"group[{key!r}] is no field{hint}"


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
    """Why the states of p have 32 bits where its fields ask for 8."""
    if not quantized_tensor.BITSANDBYTES_AVAILABLE:
        return "bitsandbytes is not installed"
    return f"the parameters are on {p.device.type}; force_8bit=True stores 8 bits there too"


def parameter_name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """The name of a parameter in error messages."""
    names = group.get("param_names", ())
    if len(names) == len(group["params"]):  # else somebody put a parameter into the group
        return f"parameter {names[index]!r}"
    p = group["params"][index]
    shape = "that is not initialized yet" if is_lazy(p) else f"(shape {tuple(p.shape)})"
    return f"parameter {index} of group {group_index} {shape}"


def refuse_dtypes(group: Mapping[str, Any], group_index: int) -> None:
    """Raises a ValueError that names the first trained parameter of a dtype that cannot be optimized."""
    for index, p in enumerate(group["params"]):
        if _is_trained(p) and p.dtype not in SUPPORTED_DTYPES:
            valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
            name = parameter_name(group, group_index, index)
            raise ValueError(f"{name} has dtype {str(p.dtype).removeprefix('torch.')}; valid: {valid}")


def refuse_placements(group: Mapping[str, Any], group_index: int) -> None:
    """Raises a ValueError that names the first trained parameter that is split in a way that is not supported."""
    for index, p in enumerate(group["params"]):
        if getattr(p, "_fsdp_flattened", False):  # torch's own mark
            raise ValueError(
                f"{parameter_name(group, group_index, index)} is a piece of a flat array, as FullyShardedDataParallel "
                "makes it, without rows and columns; split the model by fully_shard (FSDP2)"
            )
        if _is_trained(p) and is_dtensor(p):
            from automagic_torch.sharding.split import split_of

            try:
                split_of(p)
            except ValueError as error:
                raise ValueError(f"{parameter_name(group, group_index, index)}: {error}") from error


def refuse_gradients(group: Mapping[str, Any], group_index: int) -> None:
    """Refuses gradients that cannot be used, and names the first such parameter.

    Raises:
        RuntimeError: a sparse gradient, or one of another shape than its parameter.
        ValueError: a parameter of a dtype or with placements that are not supported.
    """
    for index, p in enumerate(group["params"]):
        if p.grad is None:
            continue
        if p.grad.layout != torch.strided:
            name = parameter_name(group, group_index, index)
            raise RuntimeError(f"{name} has a sparse gradient; only dense gradients can be used")
        if p.grad.shape != p.shape:
            name = parameter_name(group, group_index, index)
            raise RuntimeError(f"{name} has a gradient of shape {tuple(p.grad.shape)}; its own is {tuple(p.shape)}")
        if p.dtype not in SUPPORTED_DTYPES:
            refuse_dtypes(group, group_index)


def refuse_misfit(
    state: Mapping[str, Any],
    p: Tensor,
    names: Set[str],
    group: Mapping[str, Any],
    group_index: int,
    index: int,
) -> None:
    """Raises a RuntimeError that names the parameter unless it has its shape and the states that its fields ask for.

    Args:
        state: of the parameter, entries of others included.
        p: the parameter.
        names: of the states that its fields ask for.
        group, group_index, index: name the parameter in the message.
    """
    if "exp_avg" in state and state["exp_avg"].shape != p.shape:
        name = parameter_name(group, group_index, index)
        raise RuntimeError(
            f"{name} has shape {tuple(p.shape)} now, and states of shape {tuple(state['exp_avg'].shape)}: it was "
            "resized after its first step; make a new optimizer, or delete its entry in optimizer.state"
        )
    if state.keys() != names and own_states(state).keys() != names:
        name = parameter_name(group, group_index, index)
        raise RuntimeError(
            f"the state of {name} does not fit its group's fields: fields that decide which states there are cannot "
            "change after the first step, nor can marks or the kind of device; load_requantized goes on with others"
        )


def _is_trained(p: Tensor) -> bool:
    """Frozen parameters may have any dtype: 4-bit weights are bytes."""
    return p.requires_grad or p.grad is not None


def _refuse_schedule(lr: Any) -> None:
    if callable(lr) and not isinstance(lr, Tensor):
        raise ValueError(
            f"lr = {lr!r} is a schedule; give a number and put the schedule into torch.optim.lr_scheduler.LambdaLR"
        )


def _warn_if_nearly_a_field(key: Any) -> None:
    """Warns of a misspelt field.  It cannot be refused: any library may keep an entry of its own in a group."""
    if key in ("compiled", "state_device"):
        warnings.warn(
            f"a parameter group has {key!r}, which is an argument of the optimizer and not read", stacklevel=4
        )
    near = difflib.get_close_matches(str(key), FIELD_NAMES, n=1, cutoff=_NEARLY_THE_NAME)
    if near and key not in ("params", "param_names") and near[0].count("_") == key.count("_"):
        warnings.warn(f"a parameter group has {key!r}, which is no field; did you mean {near[0]!r}?", stacklevel=4)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces numpy's numbers, which ``torch.load(weights_only=True)`` would refuse, by Python's."""
    return {name: _plain_value(value) for name, value in fields.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, (bool, Tensor, str)) or value is None:
        return value
    if isinstance(value, Sequence):
        return tuple(_plain_value(v) for v in value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else known(value)
