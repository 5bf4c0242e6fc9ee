"""The torch optimizer: one call of it, its groups and its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from automagic_core import MAX_STEP, ArrayMemory, StatePlan, memory_report
from automagic_core.constants import NORM_HISTORY
from automagic_torch import codec
from automagic_torch.call import Array, Call, finish, update_array
from automagic_torch.gradients import gradient_stages, is_usable
from automagic_torch.groups import (
    can_store_8bit,
    default_fields,
    group_config,
    group_fields,
    is_embedding,
    parameter_name,
    plan_of,
    refuse_dtypes,
    refuse_sparse,
)
from automagic_torch.learning_rate import moved
from automagic_torch.loading import checked_state
from automagic_torch.states import new_state, state_forms
from automagic_torch.verbose import tell_step


class AutomagicCameAMP8bit(Optimizer):
    """8-bit optimizer with factored second moments, confidence, torque and a learning rate that finds itself.

    Args:
        params: parameters, named parameters or parameter groups.  A group may carry fields of its own, also a
            `profile`: what it names wins over its profile, that over the optimizer's fields.
        lr: where the rate begins, in [min_lr, max_lr]; a number or a scalar tensor.  A scheduler may set
            ``group["lr"]`` to any value later.  ``OneCycleLR`` writes its own `max_lr` and `min_lr` into the groups:
            they are then the limits here too.
        layout: ``"torch"``, or ``"flax"`` for kernels of shape (in, out) and (*spatial, in, out).
        **config: any field of `automagic_core.Config`, `profile` included.

    Raises:
        ValueError: an unknown field, a value outside its range, a schedule as `lr`, a parameter that is complex or
            of an integer dtype.

    A parameter with ``p._is_embedding = True`` is an embedding: `stable_emb` keeps its states in 32 bits.
    States go to 8 bits on CUDA only, elsewhere under `force_8bit`; both need bitsandbytes.

    Every group counts its calls in ``group["step"]`` and holds ℓ in ``group["lr_scale"]`` (0-d float32).
    Nothing in a step waits for the device.
    """

    _on_update: Callable[[Tensor, Tensor], None] | None = None
    """Called in every step with each parameter and its update in float32, before rounding to the parameter's dtype and
    before the parameter changes; zeros for a skipped array.  For tests of parity: set it on an instance."""

    def __init__(self, params: Any, lr: float | Tensor = 1e-6, *, layout: str = "torch", **config: Any) -> None:
        self._told_about_fallback = False
        super().__init__(params, default_fields(lr, layout, config))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; its `step` begins at 0.

        Raises:
            ValueError: as the constructor.  Nothing was added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        fields = group_fields(param_group, self.defaults)
        super().add_param_group({**param_group, **fields})
        group = self.param_groups[-1]
        try:
            refuse_dtypes(group, len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise
        group["step"] = 0
        group["lr_scale"] = torch.zeros((), dtype=torch.float32, device=_device_of(group))
        if group_config(group).clips_by_percentile:
            group["norm_history"] = torch.zeros(NORM_HISTORY, dtype=torch.float32, device=_device_of(group))
            group["norm_position"] = torch.zeros((), dtype=torch.int32, device=_device_of(group))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, or a state that does not fit the group's fields.  Nothing was changed.
            ValueError: a group's field was set to a value outside its range.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            refuse_sparse(group, index)
        calls = [Call(group, group_config(group), min(group["step"] + 1, MAX_STEP)) for group in self.param_groups]
        arrays = [array for index, call in enumerate(calls) for array in self._arrays(call, index)]
        for call in calls:
            call.group["step"] = call.step
            call.group["lr_scale"] = moved(call.group["lr_scale"], _device_of(call.group))
        for call in calls:
            call.clip([array for array in arrays if array.call is call])
        for array, g in zip(arrays, gradient_stages(arrays), strict=True):
            update_array(array, g, self._on_update)
        for call in calls:
            finish(call, self.state)
        tell_step(self)
        return loss

    def _arrays(self, call: Call, group_index: int) -> list[Array]:
        """The arrays of a group that take part, with their states; a new array gets one."""
        arrays = []
        for index, p in enumerate(call.group["params"]):
            if p.grad is None or p.numel() == 0:
                continue
            layout = call.group["layout"]
            plan = plan_of(p, call.config, layout, eight_bit=can_store_8bit(p, call.config))
            state = self.state.get(p)
            if not state:
                self._tell_about_fallback(p, plan, call)
                state = self.state[p] = new_state(plan, call.warming, p.device)
            elif state.keys() != state_forms(plan, call.warming).keys():
                name = parameter_name(call.group, group_index, index)
                raise RuntimeError(
                    f"the state of {name} does not fit its group's fields: "
                    "fields that decide which states there are cannot change after the first step"
                )
            arrays.append(Array(p, state, plan, is_usable(p), call))
        return arrays

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a saved state: hyperparameters, step counters and states, in the dtypes that were saved.

        torch's own method casts every floating-point state to its parameter's dtype, which would round float32
        statistics of half-precision parameters and turn codes into floats; hooks run as they do there.

        Raises:
            ValueError: the state does not fit; the message says where.  Nothing was changed.
        """
        loaded: Any = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, loaded)
            loaded = loaded if replaced is None else replaced
        groups, states = checked_state(self.param_groups, loaded)
        self.__setstate__({"state": states, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """`automagic_core.memory_report` of the tensors really held, and `bitsandbytes_available`.

        Arrays get their states in their first step: before it nothing is held and nothing counts as 8-bit.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = [self.state.get(p, {}) for p in parameters]
        memory = [
            ArrayMemory(p.numel(), "exp_avg_absmax" in state, sum(map(_bytes, state.values())))
            for p, state in zip(parameters, states, strict=True)
        ]
        shared = sum(_bytes(group["lr_scale"]) for group in self.param_groups)
        return memory_report(memory, shared) | {"bitsandbytes_available": codec.BITSANDBYTES_AVAILABLE}

    def __getstate__(self) -> dict[str, Any]:
        # Copying a parameter loses its attributes; the mark belongs to what the copied states mean.
        places = [
            (i, j)
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
            if is_embedding(p)
        ]
        return {**super().__getstate__(), "embeddings": places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        places = state.pop("embeddings", [])
        super().__setstate__(state)
        self.__dict__.setdefault("_told_about_fallback", False)
        for i, j in places:
            self.param_groups[i]["params"][j]._is_embedding = True

    def _tell_about_fallback(self, p: Tensor, plan: StatePlan, call: Call) -> None:
        """Says once that states which could have been 8-bit are not."""
        wanted = plan_of(p, call.config, call.group["layout"], eight_bit=True)
        if self._told_about_fallback or plan.quantized or not wanted.quantized:
            return
        self._told_about_fallback = True
        if not codec.BITSANDBYTES_AVAILABLE:
            reason = "bitsandbytes is not installed"
        else:
            reason = f"the parameters are on {p.device.type}; force_8bit=True stores 8 bits there too"
        warnings.warn(f"optimizer states are stored in 32 bits: {reason}", stacklevel=2)


def create_improved_8bit_optimizer(params: Any, profile: str | None = None, **overrides: Any) -> AutomagicCameAMP8bit:
    """An optimizer from a profile; fields given beside it win over it.

    Args:
        params: as for `AutomagicCameAMP8bit`.
        profile: ``"memory_optimized"``, ``"balanced"``, ``"quality_optimized"`` or None.
        **overrides: `lr`, `layout` and any field of `automagic_core.Config`.
    """
    return AutomagicCameAMP8bit(params, profile=profile, **overrides)


Automagic_CameAMP_Improved_8Bit = AutomagicCameAMP8bit


def _device_of(group: Mapping[str, Any]) -> torch.device:
    return group["params"][0].device if group["params"] else torch.device("cpu")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
