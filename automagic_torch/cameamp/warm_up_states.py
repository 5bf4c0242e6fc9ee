"""The states that only the warm-up needs: of arrays that take no part in a step, and after its end (section 6.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from automagic_core.arrays.state_forms import WARM_UP_ONLY
from automagic_torch.cameamp.call import Call


def travelled_of_absent(call: Call, states: dict[Tensor, Any], owned: Mapping[Tensor, Any]) -> list[Tensor]:
    """The new `walk` of the arrays of a group that have one and do not take part in the call.

    Args:
        call: of their group.
        states: of all arrays, ``optimizer.state``; the new values are put there.
        owned: the dicts of states that nobody else holds, which are changed in place.
    """
    if not call.searching:
        return []
    present = {p for ballot in call.ballots for p in ballot.batch.params}
    walks = []
    for p in dict.fromkeys(call.group["params"]):
        state: dict[str, Any] = states.get(p, {})
        if p in present or "walk" not in state:
            continue
        walk = state["walk"]
        if call.config.climbs or call.step == 1:
            walk = call.kept_of(walk)
            if owned.get(p) is state:
                state["walk"] = walk
            else:  # an earlier state_dict may hold the dict
                states[p] = {**state, "walk": walk}
        walks.append(walk)
    return walks


def drop_warm_up_states(call: Call, states: dict[Tensor, Any], owned: Mapping[Tensor, Any]) -> None:
    """Drops them after the last step of the warm-up; arguments as for `travelled_of_absent`."""
    if not call.warming or call.step < call.config.warmup_steps:
        return
    for p in call.group["params"]:
        state: dict[str, Any] = states.get(p, {})
        if owned.get(p) is state:  # the dict that the stacks know
            for name in WARM_UP_ONLY:
                state.pop(name, None)
        elif any(name in state for name in WARM_UP_ONLY):
            states[p] = {name: value for name, value in state.items() if name not in WARM_UP_ONLY}
