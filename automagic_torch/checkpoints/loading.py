"""Checks a saved state completely before it is loaded (docs/algorithm.md, section 6.4)."""

from __future__ import annotations

import math
import numbers
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from automagic_core import MAX_STEP, Config, StatePlan
from automagic_core.arrays.group_keys import (
    AGREEMENT,
    EFFECTIVE_LR,
    LAYOUT,
    OWN_KEYS,
    SEARCH_KEYS,
    STEP,
    missing_names,
    with_own_keys,
)
from automagic_core.arrays.layout import row_axis
from automagic_core.arrays.state_forms import SEARCH_SCALARS, WARM_UP_ONLY, as_held, foreign_states, own_states
from automagic_torch.arrays.marks import is_embedding
from automagic_torch.cameamp.effective_rate import kept_rate
from automagic_torch.cameamp.groups import can_store_8bit, group_config, parameter_name, plan_of
from automagic_torch.checkpoints.earlier import add_scalars, with_todays_forms
from automagic_torch.checkpoints.saved_values import check_norm_history, check_values, refuse_codes
from automagic_torch.codec import quantized_tensor
from automagic_torch.codec.stored import States, state_forms
from automagic_torch.sharding.agreement import same_in_all_processes
from automagic_torch.sharding.extent_of import extent_of

Group = dict[str, Any]
_BETAS = ("betas", OWN_KEYS["betas"])


def checked_state(
    groups: Sequence[Group],
    state_dict: Mapping[str, Any],
    *,
    any_device: bool = False,
    state_device: torch.device | None = None,
) -> tuple[list[Group], defaultdict[Any, Any]]:
    """The groups and states of an optimizer after loading; states are copies on their devices.

    As in all torch optimizers, saved hyperparameters replace the present ones.  They decide which states are valid.

    Args:
        groups: the optimizer's groups.
        state_dict: the saved state of an optimizer.
        state_device: the device of the states; None for that of their parameter.
        any_device: the saved number of bits is accepted, even where fields, mark or device now ask for another.

    Raises:
        ValueError: something does not fit, here or in another process that holds pieces of the parameters; the message
            says what.  Nothing was changed.
    """
    params = [p for group in groups for p in group["params"]]
    with same_in_all_processes(params):
        saved_groups, states, checked = _checked_forms(groups, state_dict, any_device)
    for p, array in checked.items():
        extent = extent_of(p, array.plan, state_device)
        states[p] = array.foreign | {key: extent.placed(key, array.kept[key], p.device) for key in array.forms}
    with same_in_all_processes(params):
        for p, array in checked.items():
            held = extent_of(p, array.plan, state_device).here([states[p][key] for key in array.forms])
            # Each process checks its own piece of a state.
            for key, part in zip(array.forms, held, strict=True):
                check_values(part, key, f"the saved state of {array.name}")
    return [_merged(g, saved) for g, saved in zip(groups, saved_groups, strict=True)], states


class _Checked(NamedTuple):
    """The saved state of one array, of which all but the values has been checked.

    Attributes:
        name: of the parameter.
        plan: of the array's states.
        forms: those that `kept` has; empty where the array has no states yet.
        kept: the states.
        foreign: what others have put there.
    """

    name: str
    plan: StatePlan
    forms: Mapping[str, Any]
    kept: States
    foreign: States


def _checked_forms(
    groups: Sequence[Group], state_dict: Mapping[str, Any], any_device: bool
) -> tuple[list[Group], defaultdict[Any, Any], dict[Tensor, _Checked]]:
    """The saved groups, the states that are carried as they are, and those of arrays."""
    entries = deepcopy(_entry(state_dict, "param_groups", (list, tuple)))
    saved_groups = [_with_tuples(with_own_keys(entry)) if isinstance(entry, Mapping) else entry for entry in entries]
    if len(saved_groups) != len(groups):
        raise ValueError(f"the saved state has {len(saved_groups)} parameter groups, the optimizer {len(groups)}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_group(group, saved, index)
    ids = list(chain.from_iterable(saved["params"] for saved in saved_groups))
    numbered = zip(ids, chain.from_iterable(group["params"] for group in groups), strict=True)
    owners: dict[Any, Tensor] = {}
    # A parameter that is listed twice has one number in both places.
    if not all(isinstance(key, (int, str)) and owners.setdefault(key, p) is p for key, p in numbered):
        raise ValueError("the saved state numbers its parameters otherwise than state_dict() does, or one twice")
    saved_states = dict(_entry(state_dict, "state", Mapping))
    unknown = set(saved_states) - set(ids)
    # As torch does, an entry by another key than a parameter's number is carried.
    carried = set() if any(isinstance(key, str) for key in ids) else {key for key in unknown if isinstance(key, str)}
    if unknown := unknown - carried:
        raise ValueError(f"the saved state has entries for unknown parameters: {sorted(unknown, key=str)}")

    states: defaultdict[Any, Any] = defaultdict(dict, {key: deepcopy(saved_states[key]) for key in carried})
    checked: dict[Tensor, _Checked] = {}
    for group_index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if saved_states.get(key) and p not in checked:
                name = parameter_name(group, group_index, index)
                checked[p] = _checked_array(p, saved_states[key], saved, name, any_device)
    return saved_groups, states, checked


def _with_tuples(group: Group) -> Group:
    # `torch.distributed.checkpoint` gives lists back.
    return {key: tuple(value) if key in _BETAS and isinstance(value, list) else value for key, value in group.items()}


def _entry(state_dict: Mapping[str, Any], name: str, kind: Any) -> Any:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"the saved state is a {type(state_dict).__name__}; valid: a dict, as state_dict() gives it")
    if name not in state_dict:
        raise ValueError(f"the saved state has no {name!r}")
    value = state_dict[name]
    if not isinstance(value, kind):
        raise ValueError(f"the saved state has a {type(value).__name__} as {name!r}; valid: what state_dict() gives")
    return value


def _check_group(group: Group, saved: Any, index: int) -> None:
    if not isinstance(saved, Mapping):
        raise ValueError(f"group {index} of the saved state is a {type(saved).__name__}; valid: a dict")
    if missing := missing_names(saved):
        raise ValueError(f"group {index} of the saved state lacks {', '.join(missing)}")
    if not isinstance(saved["params"], (list, tuple)):
        raise ValueError(f"group {index} of the saved state has params = {saved['params']!r}; valid: a list")
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            f"group {index} has {len(saved['params'])} parameters in the saved state, "
            f"{len(group['params'])} in the optimizer"
        )
    names, now = saved.get("param_names") or (), group.get("param_names") or ()
    if list(names) != list(now) and sorted(names) == sorted(now):
        old, new = next(pair for pair in zip(names, now, strict=True) if pair[0] != pair[1])
        warnings.warn(
            f"group {index} was saved in another order: states go by place, so that of {old!r} goes to {new!r}",
            stacklevel=4,
        )
    if saved[LAYOUT] != group[LAYOUT]:
        raise ValueError(f"group {index} was saved with layout {saved[LAYOUT]!r}, the optimizer has {group[LAYOUT]!r}")
    step = saved[STEP]
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise ValueError(f"group {index} has step = {step!r} in the saved state; valid: an integer in [0, {MAX_STEP}]")
    for name, key in zip(SEARCH_SCALARS, SEARCH_KEYS, strict=True):
        value = saved.get(key)
        if value is None and AGREEMENT not in saved and key != SEARCH_KEYS[0]:
            continue  # version 0.1.0 had only ℓ
        if not isinstance(value, Tensor) or not _is_scalar(value) or value.dtype != torch.float32:
            raise ValueError(f"group {index} has {name} = {value!r} in the saved state; valid: a float32 scalar tensor")
        check_values(value, name, f"group {index} of the saved state")
    if not _is_rate(saved["lr"]):
        raise ValueError(f"group {index} has lr = {saved['lr']!r} in the saved state; valid: a finite number")
    try:
        config = group_config(saved)
    except ValueError as error:
        raise ValueError(f"group {index} of the saved state: {error}") from error
    check_norm_history(saved, config, f"group {index} of the saved state")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == () and value.layout == torch.strided


def _is_rate(lr: Any) -> bool:
    # A scheduler may have set a rate beyond the limits.
    if isinstance(lr, Tensor):
        return lr.numel() == 1 and lr.layout == torch.strided and math.isfinite(lr)
    return isinstance(lr, numbers.Real) and not isinstance(lr, bool) and math.isfinite(lr)


def _checked_array(p: Tensor, saved: Mapping[str, Any], group: Group, name: str, any_device: bool) -> _Checked:
    config = group_config(group)
    if not isinstance(saved, Mapping):
        raise ValueError(f"the saved state of {name} is a {type(saved).__name__}; valid: a dict")
    warming = group[STEP] < config.warmup_steps
    # A distributed checkpoint holds the states of the warm-up even after it; they are dropped.
    kept = {key: value for key, value in own_states(saved).items() if warming or key not in WARM_UP_ONLY}
    foreign = {
        key: value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
        for key, value in foreign_states(saved).items()
    }
    plan = plan_of(p, config, group[LAYOUT], eight_bit=can_store_8bit(p, config))
    if not kept:
        return _Checked(name, plan, {}, {}, foreign)
    marked_since = "exp_avg_absmax" in saved and config.stable_emb and is_embedding(p)
    if any_device:
        plan = as_held(plan, saved)
        if marked_since and plan.row_axis != row_axis(p.ndim, group[LAYOUT]):
            raise ValueError(
                f"{name} is marked as an embedding, and its saved state holds 8 bits, so it had no mark: with layout "
                f"{group[LAYOUT]!r} the mark turns its rows"
            )
    forms = state_forms(plan, warming)
    if "walk" in forms and AGREEMENT not in group:  # version 0.1.0 had none
        kept.setdefault("walk", torch.zeros(plan.row_shape, dtype=torch.float32))
    if group[STEP] == 0:  # an array from a group whose search is over: it searches anew, as `of_this_group` says
        for key in forms.keys() & set(WARM_UP_ONLY):
            kept.setdefault(key, torch.zeros(forms[key].shape, dtype=forms[key].dtype))
    if all(isinstance(value, Tensor) for value in kept.values()):
        kept = with_todays_forms(kept, plan, config, warming)
    if "exp_avg_absmax" not in kept:
        refuse_codes(kept.get("exp_avg"), config.update_clip, name)
    _check_bits(kept, plan.quantized, config, name, marked_since)
    differing = sorted(set(kept) ^ set(forms), key=str)
    if differing and set(differing) <= set(WARM_UP_ONLY) - kept.keys():
        raise ValueError(
            f"the saved state of {name} is within its warm-up and lacks {', '.join(differing)}: the flat form of "
            "set_optimizer_state_dict leaves out what the optimizer does not have, so give it a new optimizer"
        )
    if differing:
        listed = ", ".join(f"{key} ({'unknown' if key in kept else 'missing'})" for key in differing)
        raise ValueError(f"the saved state of {name} does not fit: {listed}")
    for key, form in forms.items():
        value = kept[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"the saved state of {name} has {key} = {value!r}; valid: a tensor")
        if (tuple(value.shape), value.dtype) != form or value.layout != torch.strided:
            raise ValueError(
                f"the saved state of {name} has {key} of shape {tuple(value.shape)} and {value.dtype}; "
                f"valid: {form.shape} and {form.dtype}, dense"
            )
    return _Checked(name, plan, forms, kept, foreign)


def _check_bits(saved: Mapping[str, Any], planned: bool, config: Config, name: str, marked_since: bool) -> None:
    held = "exp_avg_absmax" in saved
    if held == planned:
        return
    if planned:
        hint = "its hyperparameters plan 8 bits here; save from the same device, or set optim_bits to 32 in it"
        if config.stable_emb:
            hint += "; if it is an embedding, call mark_embeddings(model) before loading"
    elif marked_since:
        hint = "it is marked as an embedding, which stable_emb keeps in 32 bits, and had no mark when it was saved"
    elif not quantized_tensor.BITSANDBYTES_AVAILABLE:
        hint = "8 bits need bitsandbytes, which is not installed"
    elif config.optim_bits == 8 and not config.force_8bit:
        hint = "its hyperparameters plan 32 bits here; outside CUDA 8 bits need force_8bit=True in it"
    else:
        hint = "its hyperparameters plan 32 bits here"
    raise ValueError(f"the saved state of {name} holds {8 if held else 32} bits: {hint}")


def _merged(group: Group, saved: Group) -> Group:
    lr = saved["lr"]
    merged = {**saved, "params": group["params"], "lr": lr if isinstance(lr, Tensor) else float(lr)}
    add_scalars(merged)
    held = saved.get(EFFECTIVE_LR)
    if (
        isinstance(held, Tensor) and not held.is_meta and not held.isfinite().all()
    ):  # not known: see `OldNamesLoadPlanner`
        saved = {key: value for key, value in saved.items() if key != EFFECTIVE_LR}
    merged[EFFECTIVE_LR] = kept_rate(saved)
    if "param_names" in group:
        merged["param_names"] = group["param_names"]  # messages name what is there now
    return merged
