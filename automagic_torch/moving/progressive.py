"""Quantizes 32-bit states step by step while a run goes on (docs/algorithm.md, section 10.1)."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from typing import Any

from automagic_core.arrays.group_keys import LAYOUT, STEP, group_key
from automagic_core.arrays.state_forms import foreign_states, own_states
from automagic_core.moving.progressive import progressive_min_8bit_size
from automagic_torch.cameamp.groups import can_store_8bit, group_config, plan_of
from automagic_torch.moving.float_states import rounding, stored_values
from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.sharding.extent import whole_state
from automagic_torch.sharding.extent_of import extent_of
from automagic_torch.watching.own_optimizer import own_optimizer

_BITS, _SIZE = map(group_key, ("optim_bits", "min_8bit_size"))


class ProgressiveQuantization:
    """Quantizes the states of an optimizer while it runs, the largest arrays first.

    In the first 20 % of the steps all states have 32 bits.  In the middle 60 % arrays with at least as many elements as
    a threshold have 8 bits; it falls geometrically from 8192 to 2048.  In the last 20 % all arrays have 8 bits that may
    (section 3.1), whatever their size.  Groups with ``optim_bits=32`` are left alone.

    Call `step` after every ``optimizer.step()``; more calls do no harm.  An array is quantized once.  Its codes are
    those that it would have if the optimizer's last step had stored 8 bits.

    The present threshold is written into every group, as ``group["automagic_min_8bit_size"]``, and into the defaults of
    groups that are added later.  So checkpoints fit at any time, and a new array gets its states in the right form.

    Args:
        optimizer: an `AutomagicCameAMP8bit`, alone or in a wrapper, best before its first step: states in 8 bits stay
            so.
        total_steps: how many steps will follow.  Only steps that the optimizer takes count, not those that a
            ``GradScaler`` leaves out.

    Raises:
        TypeError: another optimizer, or `total_steps` that is no integer.
        ValueError: `total_steps` below 1.

    Example:
        >>> quantization = ProgressiveQuantization(optimizer, total_steps=10_000)
        >>> for batch in batches:
        ...     loss(batch).backward()
        ...     optimizer.step()
        ...     quantization.step()
    """

    def __init__(self, optimizer: AutomagicCameAMP8bit, total_steps: int) -> None:
        self.optimizer = own_optimizer(optimizer)
        self.total_steps = operator.index(total_steps)
        self.started_at = self._optimizer_steps()
        self.step()
        self._warn_if_nothing_can_be_quantized()

    @property
    def steps_done(self) -> int:
        """Steps of the optimizer since this object was made."""
        return max(0, self._optimizer_steps() - self.started_at)

    @property
    def min_8bit_size(self) -> int:
        """The present threshold."""
        return progressive_min_8bit_size(self.steps_done, self.total_steps)

    def step(self) -> None:
        """Quantizes the arrays that are due."""
        size = self.optimizer.defaults[_SIZE] = self.min_8bit_size
        for group in self.optimizer.param_groups:
            if group[_BITS] == 8 and group[_SIZE] != size:
                self._quantize(group, size)

    def _quantize(self, group: dict[str, Any], size: int) -> None:
        states = self.optimizer.state
        held = [p.numel() for p in group["params"] if "exp_avg_absmax" in states.get(p, {})]
        # Arrays that have 8 bits keep them, so the threshold must not be above their sizes.
        group[_SIZE] = min([size, *held])
        config = group_config(group)
        for p in group["params"]:
            state = own_states(states.get(p, {}))
            if not state or "exp_avg_absmax" in state:
                continue
            plan = plan_of(p, config, group[LAYOUT], eight_bit=can_store_8bit(p, config))
            if plan.quantized:
                # A new dict, since an earlier state_dict may hold the old one.
                values = stored_values(whole_state(state, p.device), plan, rounding(config, group[STEP]))
                adopted = extent_of(p, plan, self.optimizer.state_device).adopted(values, p.device)
                states[p] = foreign_states(states[p]) | adopted

    def _optimizer_steps(self) -> int:
        return max((group[STEP] for group in self.optimizer.param_groups), default=0)

    def _warn_if_nothing_can_be_quantized(self) -> None:
        groups = self.optimizer.param_groups
        configs = [group_config(group) for group in groups]
        if not any(
            config.optim_bits == 8 and can_store_8bit(p, config)
            for group, config in zip(groups, configs, strict=True)
            for p in group["params"]
        ):
            warnings.warn(
                "no state will move to 8 bits: that needs optim_bits=8, bitsandbytes, and parameters on CUDA or "
                "force_8bit=True",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of this object, which a resumed run needs besides the optimizer's."""
        sizes = [group[_SIZE] for group in self.optimizer.param_groups]
        return {"total_steps": self.total_steps, "started_at": self.started_at, "min_8bit_sizes": sizes}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state of another object, before or after the optimizer's `load_state_dict`.

        With ``torch.distributed.checkpoint`` before a fresh optimizer is asked for its states: then they have the forms
        of the saved ones.

        Raises:
            ValueError: an entry is missing or not valid.  Nothing was changed.
        """
        values = {name: state_dict.get(name) for name in ("total_steps", "started_at")}
        for name, least in (("total_steps", 1), ("started_at", 0)):
            value = values[name]
            if not isinstance(value, int) or value < least:
                raise ValueError(f"the saved state has {name} = {value!r}; valid: an integer ≥ {least}")
        groups = self.optimizer.param_groups
        # Earlier versions had no sizes, and after the first step nothing needs them.
        sizes = None if self._optimizer_steps() else state_dict.get("min_8bit_sizes")
        if sizes is not None and not _are_sizes(sizes, len(groups)):
            raise ValueError(
                f"the saved state has min_8bit_sizes = {sizes!r}; valid: {len(groups)} integers ≥ 1, one for each group"
            )
        self.total_steps, self.started_at = int(values["total_steps"] or 1), int(values["started_at"] or 0)
        if sizes is None:
            self.step()
            return
        self.optimizer.defaults[_SIZE] = max(sizes, default=self.min_8bit_size)
        for group, size in zip(groups, sizes, strict=True):
            group[_SIZE] = size


def _are_sizes(sizes: Any, count: int) -> bool:
    return isinstance(sizes, (list, tuple)) and len(sizes) == count and all(isinstance(x, int) and x > 0 for x in sizes)
