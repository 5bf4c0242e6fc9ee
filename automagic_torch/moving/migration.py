"""Starts this optimizer from the moments of an Adam run (docs/algorithm.md, section 10.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from automagic_core import StatePlan
from automagic_core.arrays.bias import stored_confidence, weight_seen
from automagic_core.arrays.group_keys import EFFECTIVE_LR, LAYOUT, PEAK_AGREEMENT, SEARCH_KEYS, STEP
from automagic_core.arrays.parts import in_parts, part_shapes
from automagic_core.config.constants import SQUARE_FLOOR
from automagic_core.moving.notes import Notes
from automagic_torch.cameamp.effective_rate import formed_rate
from automagic_torch.cameamp.groups import can_store_8bit, group_config, parameter_name, plan_of
from automagic_torch.cameamp.verbose import LOGGER
from automagic_torch.codec.stored import States
from automagic_torch.moving.adam_states import AdamMoments, adam_moments
from automagic_torch.moving.float_states import rounding, stored_values
from automagic_torch.moving.fresh_states import background_of, note_fresh_states, with_fresh_states
from automagic_torch.moving.taking_over import put_into
from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.sharding.extent_of import extent_of
from automagic_torch.stages.norm_history import HISTORY, POSITION, add_norm_history
from automagic_torch.watching.own_optimizer import own_optimizer


def load_adam_state(
    optimizer: AutomagicCameAMP8bit, adam_state_dict: Mapping[str, Any], *, restart_warmup: bool = True
) -> list[str]:
    """Takes over the moments of an Adam run.

    The first step goes on in Adam's direction.  Section 10.2 says with what value each state begins.  All states and
    counters of `optimizer` are replaced.  Its hyperparameters stay; those of Adam are not taken over.

    Args:
        optimizer: an optimizer of the same parameters in the same groups and order, alone or in a wrapper.
        adam_state_dict: ``state_dict()`` of ``torch.optim.AdamW`` or ``Adam``, or of bitsandbytes' ``AdamW8bit`` and
            its relatives, or torchao's.
        restart_warmup: begin at step 0, so that the ramp and the rate search begin again.  False goes on at the step of
            Adam's oldest array; ℓ is 0 then too.

    Returns:
        What was not taken over or begins anew, one sentence each; also logged to ``automagic_torch``.

    Raises:
        TypeError: another optimizer.
        ValueError: groups, parameters or states do not correspond.  Nothing was changed.

    Example:
        >>> optimizer = AutomagicCameAMP8bit(model.parameters(), lr=1e-4, warmup_steps=200)
        >>> told = load_adam_state(optimizer, adamw.state_dict())
    """
    optimizer = own_optimizer(optimizer)
    notes = Notes()
    saved_groups = _matching_groups(optimizer.param_groups, adam_state_dict)
    saved_states = adam_state_dict["state"]
    if not any(saved_states.get(key) for group in saved_groups for key in group["params"]):
        raise ValueError("Adam's state has no states of any parameter: it took no step, or is of another optimizer")
    new_groups = []
    states: dict[Tensor, States] = {}
    for group_index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        betas, eps = _constants(saved, group_index)
        moments: list[tuple[str, Tensor, AdamMoments]] = []
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            name = parameter_name(group, group_index, index)
            entry = saved_states.get(key)
            found = adam_moments(entry, p.shape, p.device, betas, name) if entry else None
            if found is None:
                notes.changed("no steps of Adam: states begin as in a new run", name)
                continue
            for other in found.others:
                notes.lost(f"Adam's {other} has no place here: dropped", name)
            if p.numel():
                moments.append((name, p, found))
        step = 0 if restart_warmup else max((found.age for _, _, found in moments), default=0)
        new_group = _restarted(group, step)
        new_groups.append(new_group)
        for name, p, found in moments:
            values, plan, added = _state_from(p, found, eps, new_group)
            states[p] = extent_of(p, plan, optimizer.state_device).adopted(values, p.device)
            note_fresh_states(notes, added, name)
    notes.changed("Adam's hyperparameters (lr, betas, eps, weight_decay) are not taken over: this optimizer's own hold")
    notes.changed(
        "step and log_rate_scale begin at 0: warm-up and search for the rate start again"
        if restart_warmup
        else "log_rate_scale begins at 0: Adam has no search"
    )
    put_into(optimizer, states, new_groups)
    return notes.tell(LOGGER)


def _matching_groups(groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(saved, Mapping):
        raise ValueError(f"Adam's state is a {type(saved).__name__}; valid: a dict, as state_dict() gives it")
    for name, kind in (("state", Mapping), ("param_groups", Sequence)):
        if name not in saved:
            raise ValueError(f"Adam's state has no {name!r}")
        if not isinstance(saved[name], kind):
            raise ValueError(
                f"Adam's state has a {type(saved[name]).__name__} as {name!r}; valid: what state_dict() gives"
            )
    saved_groups: Sequence[Mapping[str, Any]] = saved["param_groups"]
    sizes = [len(group["params"]) for group in saved_groups]
    wanted = [len(group["params"]) for group in groups]
    if sizes != wanted:
        raise ValueError(f"Adam's state has groups of {sizes} parameters, the optimizer of {wanted}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        names, saved_names = group.get("param_names"), saved_group.get("param_names")
        if names is not None and saved_names is not None and list(names) != list(saved_names):
            differing = [
                f"{theirs!r} for {ours!r}" for ours, theirs in zip(names, saved_names, strict=True) if ours != theirs
            ]
            raise ValueError(f"group {index} of Adam's state has other parameters: {', '.join(differing[:5])}")
    known = {key for group in saved_groups for key in group["params"]}
    unknown = set(saved["state"]) - known
    if unknown:
        raise ValueError(f"Adam's state has entries for unknown parameters: {sorted(unknown, key=str)}")
    return saved_groups


def _constants(saved_group: Mapping[str, Any], index: int) -> tuple[tuple[float, float], float]:
    """Adam's betas and ε."""
    betas = saved_group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(
            f"group {index} of Adam's state has betas = {betas!r}; valid: two numbers in [0, 1), as an "
            "Adam has; states of other kinds of optimizers cannot be taken over"
        )
    return (float(betas[0]), float(betas[1])), float(saved_group.get("eps", 0.0))


def _restarted(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The group at another step, with ℓ = 0 and a new history of norms.  In mid-run the climb counts as over."""
    new = {name: value for name, value in group.items() if name not in (HISTORY, POSITION)}
    new[STEP] = step
    new |= {key: torch.zeros_like(group[key]) for key in SEARCH_KEYS}
    if step > 0:
        new[PEAK_AGREEMENT] = torch.full_like(new[PEAK_AGREEMENT], -1.0)
    new[EFFECTIVE_LR] = formed_rate(new, max(step, 1))
    add_norm_history(new, group_config(new), new[EFFECTIVE_LR].device)
    return new


def _state_from(
    p: Tensor, adam: AdamMoments, eps: float, group: Mapping[str, Any]
) -> tuple[States, StatePlan, list[str]]:
    """The states of one array, their plan, and the names of the states that begin anew."""
    config = group_config(group)
    plan = plan_of(p, config, group[LAYOUT], eight_bit=can_store_8bit(p, config))
    beta1, beta2, beta3 = config.betas
    # With Adam's ε, since elements that it held back would jump without it.
    root = adam.v_hat.clamp(min=SQUARE_FLOOR).sqrt_().add_(eps)
    u = (adam.m_hat / root).clamp_(-config.update_clip, config.update_clip)
    v = adam.v_hat * weight_seen(beta2, adam.age)
    r = torch.full_like(v, stored_confidence(1.0, beta3, adam.age))

    def scalar(value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=p.device)

    values: States = {
        "exp_avg": u * weight_seen(beta1, adam.age),
        "age": scalar(adam.age, torch.int32),
        "torque_mean": scalar(1.0, torch.float32),
    }
    for moment, value in (("exp_avg_sq", v), ("exp_avg_res", r)):
        values |= in_parts({moment: value}, moment, part_shapes(plan, moment), value)
    if plan.has_background_scale:
        values["background_scale"] = background_of(adam.v_hat)
    warming = group[STEP] < config.warmup_steps
    values, added = with_fresh_states(values, adam.v_hat, adam.age, plan, warming)
    return stored_values(values, plan, rounding(config, group[STEP])), plan, added
