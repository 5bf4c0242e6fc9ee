"""Continues a run with other bits, other blocks or another `factored` (docs/algorithm.md, section 10.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from automagic_core import Config, StatePlan
from automagic_core.arrays.bias import weight_seen
from automagic_core.arrays.decay import decay
from automagic_core.arrays.group_keys import EFFECTIVE_LR, LAYOUT, LOG_RATE_SCALE, PREFIX, SEARCH_KEYS, STEP, fields_of
from automagic_core.arrays.parts import elements, in_parts, part_shapes, what_is_lost
from automagic_core.arrays.state_forms import COMPANDED, as_held, coded_shapes, foreign_states, own_states
from automagic_core.moving.notes import Notes
from automagic_torch.cameamp.groups import can_store_8bit, group_config, parameter_name, plan_of
from automagic_torch.cameamp.verbose import LOGGER
from automagic_torch.checkpoints.loading import checked_state
from automagic_torch.codec.stored import States, state_forms
from automagic_torch.moving.float_states import float_values, rounding, stored_values
from automagic_torch.moving.fresh_states import (
    background_of,
    note_fresh_states,
    with_fresh_states,
)
from automagic_torch.moving.taking_over import put_into
from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.sharding.extent import whole_state
from automagic_torch.sharding.extent_of import extent_of
from automagic_torch.stages.norm_history import HISTORY, POSITION, add_norm_history
from automagic_torch.watching.own_optimizer import own_optimizer


def load_requantized(optimizer: AutomagicCameAMP8bit, state_dict: Mapping[str, Any]) -> list[str]:
    """Takes over a saved run and converts its states to the form that `optimizer` stores.

    ``optimizer.load_state_dict`` would take over the saved hyperparameters; here the optimizer's own stay, but for
    `lr`, which schedulers move and for which ℓ was found.  `step`, ℓ, `lr_mask`, ages and counters are those of the
    saved run.  A state that keeps its form keeps every bit.  One that goes to 8 bits is rounded with the random bits of
    the saved step.

    Args:
        optimizer: an optimizer of the same parameters in the same groups, order and layout, alone or in a wrapper.
        state_dict: ``state_dict()`` of an `AutomagicCameAMP8bit`, from any device.

    Returns:
        What changed its form, was dropped or begins anew, one sentence each; also logged to ``automagic_torch``.

    Raises:
        TypeError: another optimizer.
        ValueError: the state does not fit; the message says where.  Nothing was changed.

    Example:
        >>> told = load_requantized(AutomagicCameAMP8bit(params, force_8bit=True), run_in_32_bits.state_dict())
    """
    optimizer = own_optimizer(optimizer)
    notes = Notes()
    saved_groups, saved_states = checked_state(optimizer.param_groups, state_dict, any_device=True)
    new_groups = []
    states: dict[Tensor, States] = {}
    for group_index, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        new_group = _continued(group, saved, group_index, notes)
        new_groups.append(new_group)
        for index, p in enumerate(group["params"]):
            if own := own_states(saved_states.get(p, {})):
                name = parameter_name(group, group_index, index)
                state = whole_state(own, p.device)
                new_state, plan = _requantized(p, state, saved, new_group, name, notes)
                adopted = extent_of(p, plan, optimizer.state_device).adopted(new_state, p.device)
                states[p] = foreign_states(saved_states[p]) | adopted
    others = {key: value for key, value in saved_states.items() if not isinstance(key, Tensor)}
    put_into(optimizer, others | states, new_groups)
    return notes.tell(LOGGER)


def _continued(group: Mapping[str, Any], saved: Mapping[str, Any], index: int, notes: Notes) -> dict[str, Any]:
    """The group with its own fields, and the rate, step, ℓ and norms of the saved one."""
    theirs = fields_of(saved)
    for field, value in fields_of(group).items():
        if value != theirs[field] and field == "lr":
            notes.changed(f"group {index} goes on with the saved run's lr = {theirs[field]!r}, not {value!r}")
        elif value != theirs[field] and field != "profile":
            notes.changed(f"group {index} keeps its own {field} = {value!r}; the saved run had {theirs[field]!r}")
    new = dict(group) | {key: saved[key] for key in ("lr", "initial_lr") if key in saved}
    device = group[LOG_RATE_SCALE].device
    new |= {STEP: saved[STEP]} | {key: saved[key].to(device, copy=True) for key in SEARCH_KEYS}
    new[EFFECTIVE_LR] = saved[EFFECTIVE_LR]
    config = group_config(new)
    for key in (HISTORY, POSITION):
        new.pop(key, None)
        if config.clips_by_percentile and key in saved:
            new[key] = saved[key].to(device, copy=True)
        elif key in saved:
            notes.lost(f"group {index} clips no percentile: {key.removeprefix(PREFIX)} is dropped")
    if config.clips_by_percentile and HISTORY not in saved:
        notes.changed(f"group {index} begins a new history of gradient norms")
    add_norm_history(new, config, device)
    return new


def _requantized(
    p: Tensor, state: States, saved: Mapping[str, Any], group: Mapping[str, Any], name: str, notes: Notes
) -> tuple[States, StatePlan]:
    """One array's states in the form of its new group, and their plan."""
    old_config, config = group_config(saved), group_config(group)
    # Fields, mark and device may have changed since; the bits that are there decide.
    old = as_held(plan_of(p, old_config, saved[LAYOUT], eight_bit=True), state)
    plan = plan_of(p, config, group[LAYOUT], eight_bit=can_store_8bit(p, config))
    age = int(state["age"])
    warming = group[STEP] < config.warmup_steps
    read = float_values(state, old)
    values = _with_betas(read, old_config, config, age)
    _note_bits(old, plan, name, notes)
    for moment in COMPANDED:
        held = {part: values.pop(part) for part in old.parts(moment)}
        wanted = part_shapes(plan, moment)
        values |= in_parts(held, moment, wanted, values["exp_avg"])
        if (loss := what_is_lost(moment, held, wanted)) is not None:
            notes.lost(loss, name)
    if age > 0:
        v_hat = elements(values, "exp_avg_sq") / weight_seen(config.betas[1], age)
        if plan.has_background_scale and float(values.get("background_scale", 0)) == 0:
            values["background_scale"] = background_of(v_hat)
        values, added = with_fresh_states(values, v_hat, age, plan, warming)
        note_fresh_states(notes, added, name)
    else:
        # The array took no step, so all states are zeros.
        zeros = values["exp_avg"]
        values, _ = with_fresh_states(values, zeros, 1, plan, warming)
    for dropped in sorted(set(values) - _names(plan, warming)):
        notes.lost(f"{dropped} has no use under the present fields: dropped", name)
        del values[dropped]
    new = stored_values(values, plan, rounding(config, group[STEP]))
    if (old.quantized, old.block_size) == (plan.quantized, plan.block_size):
        # Unchanged states keep their codes, since rounding them again would add noise.
        for unchanged in (key for key in coded_shapes(plan) if key in values and values[key] is read.get(key)):
            new |= {part: state[part] for part in (unchanged, unchanged + "_absmax")}
    return new, plan


def _names(plan: StatePlan, warming: bool) -> set[str]:
    return {name for name in state_forms(plan, warming) if not name.endswith("_absmax")}


def _with_betas(read: States, old: Config, new: Config, age: int) -> States:
    """Rescales the moments where `betas` differ, so that their bias-corrected values stay."""
    values = dict(read)
    for position, moment in enumerate(("exp_avg", "exp_avg_sq", "exp_avg_res")):
        before, after = old.betas[position], new.betas[position]
        if before == after or age == 0:
            continue
        gain = weight_seen(after, age) / weight_seen(before, age)
        shift = 0.0
        if moment == "exp_avg_res":
            # r̂ = (r + c) / (c + 1 − βᵃ) with c = 1 − β
            c, new_c = decay(before).complement, decay(after).complement
            gain = (new_c + weight_seen(after, age)) / (c + weight_seen(before, age))
            shift = gain * c - new_c
        for name in (moment, moment + "_row", moment + "_col"):
            if name in values:
                scaled = values[name] * gain + shift
                values[name] = scaled if moment == "exp_avg" else scaled.clamp_(min=0)
    return values


def _note_bits(old: StatePlan, new: StatePlan, name: str, notes: Notes) -> None:
    if old.quantized and not new.quantized:
        notes.changed("8-bit states go on in 32 bits as they read; what rounding took stays lost", name)
    elif new.quantized and not old.quantized:
        notes.changed("32-bit states are rounded to 8 bits", name)
    elif new.quantized and old.block_size != new.block_size:
        notes.changed(f"8-bit states are rounded again to blocks of {new.block_size or 'the whole array'}", name)
