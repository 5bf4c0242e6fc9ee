"""`AutomagicCameAMP8bit`, the optimizer of docs/algorithm.md: its steps, groups and checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from automagic_core import Config, StatePlan
from automagic_core.arrays.group_keys import (
    EFFECTIVE_LR,
    LAYOUT,
    SEARCH_KEYS,
    STEP,
    ParameterGroup,
    with_own_keys,
)
from automagic_core.arrays.state_forms import own_states
from automagic_torch.arrays.host_memory import checked_state_device, wait_for_copies
from automagic_torch.arrays.marks import held_marks, set_marks
from automagic_torch.cameamp.batches import (
    Place,
    agree_on_gradients,
    agree_on_presence,
    kind,
    new_batches,
    of_this_group,
    refuse_replaced,
)
from automagic_torch.cameamp.call import Batch, Call, OpenStep
from automagic_torch.cameamp.effective_rate import HighestRates, formed_rate, kept_rate, learning_rates
from automagic_torch.cameamp.groups import (
    as_group,
    default_fields,
    group_config,
    group_device,
    plan_of,
    reason_for_32_bits,
    refuse_dtypes,
    refuse_gradients,
    refuse_misfit,
    refuse_placements,
    unused_entries,
)
from automagic_torch.cameamp.rehearsal import is_rehearsal
from automagic_torch.cameamp.verbose import tell_step
from automagic_torch.cameamp.warm_up_states import drop_warm_up_states, travelled_of_absent
from automagic_torch.checkpoints.earlier import add_forms, add_search
from automagic_torch.checkpoints.loading import checked_state
from automagic_torch.checkpoints.placeholders import as_saved
from automagic_torch.stages.norm_history import HISTORY, POSITION, add_norm_history, has_norm_history
from automagic_torch.steps.array_step import update_batch
from automagic_torch.steps.compiled import checked_compiled, missing_compiler
from automagic_torch.steps.held_stacks import HeldStacks
from automagic_torch.watching.memory_table import efficiency_report
from automagic_torch.watching.metrics import metrics

_ON_META = "make the optimizer after `to_empty`, which makes new parameters, or swap the tensors of the old ones"


class AutomagicCameAMP8bit(Optimizer):
    """8-bit optimizer with factored second moments, confidence, torque and a learning rate that finds itself.

    Args:
        params: parameters, named parameters or parameter groups.  A group may have its own fields, also a `profile`:
            its fields win over its profile, which wins over the optimizer's fields.
        lr: the rate at which the search begins, in [min_lr, max_lr], or 0 to begin with no rate; a number or a scalar
            tensor.  A scheduler may set ``group["lr"]`` to any value later.
        layout: ``"torch"``, or ``"flax"`` for kernels of shape (in, out) and (*spatial, in, out).
        state_device: ``"cpu"`` keeps all states in the host's memory, pinned where there is CUDA, and brings those of
            one batch at a time to the device.  A step then waits for the device at its end.  None keeps states with
            their parameters.  It is not part of the `state_dict`.
        compiled: None compiles the step of arrays on CUDA, by `torch.compile` of torch 2.9 or later; True compiles it
            on a CPU too; False never does.  See docs/algorithm.md, section 8.1.  It is not part of the `state_dict`.
        **config: any field of `automagic_core.Config`, `profile` included.

    Raises:
        ValueError: an unknown field, a value outside its range, a schedule as `lr`, or a trained parameter of a
            complex or an integer dtype.  Frozen parameters may have any dtype.

    `mark_embeddings` and `mark_lora` mark embeddings, whose states `stable_emb` keeps in 32 bits, and adapters, the
    arrays on which stage 4 works (section 1.4).  States have 8 bits on CUDA, and elsewhere with `force_8bit`;
    both need bitsandbytes.

    In a group the fields, except `lr` and `weight_decay`, have the prefix ``automagic_``, and so have `step`, ℓ in
    `log_rate_scale`, what the search holds beside it, and while `percentile_clipping` is below 100 `norm_history` and
    `norm_position` (section 6.1).  Change a field there: ``group["automagic_max_lr"] = 1e-2``.  ``group["max_lr"]``
    reads it too, unless a scheduler keeps an entry of that name.  All other keys of a group, and other entries of
    ``optimizer.state[p]``, are saved and restored, and never read.  ``group["effective_lr"]`` is what
    `get_learning_rates` gives, as a tensor.  Arrays of one kind are computed as one batch (section 8).  Nothing in a
    step waits for the device.
    """

    _on_update: Callable[[Tensor, Tensor], None] | None = None
    """Called with each parameter and its float32 update (zeros for a skipped array) before the parameter changes.
    Tests of parity set it on an instance."""

    _stage_energy: dict[str, tuple[Tensor, Tensor]]
    """For each stage that is on, Σ g² of all gradients before and after it in the last step, 0-d."""

    _open_step: OpenStep | None = None
    """The step that a backward pass began and the next call of `step` will close."""

    _gradient_release: Any = None
    """The `automagic_torch.gradient_release.GradientRelease` in force."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-6,
        *,
        layout: str = "torch",
        state_device: str | torch.device | None = None,
        compiled: bool | None = None,
        **config: Any,
    ) -> None:
        self.compiled = checked_compiled(compiled)
        self._owned: dict[Tensor, Any] = {}
        self._stacks = HeldStacks()
        self.state_device = checked_state_device(state_device)
        self._told: set[str] = set()
        self._gradients_agreed: dict[int, list[bool]] = {}
        self._highest_rates = HighestRates([])
        self._stage_energy = {}
        super().__init__(params, default_fields(lr, layout, config))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at any time; its `step` begins at 0.

        Fields have their plain names.  Any other key is somebody else's and is kept; one that is nearly the name of a
        field makes a warning.

        Raises:
            ValueError: as in the constructor.  Nothing was added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        self._refuse_open_step("a group cannot be added")
        try:
            group: dict[str, Any] = as_group(param_group, self.defaults)
        except ValueError as error:
            raise ValueError(f"group {len(self.param_groups)}: {error}") from error
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            refuse_dtypes(group, len(self.param_groups) - 1)
            refuse_placements(group, len(self.param_groups) - 1)
            for name, sentence in group_config(group).advice():
                self._warn_once(name, sentence)
            if self._gradient_release is not None:
                self._gradient_release.watch()
        except BaseException:  # a warning can be one, too
            self.param_groups.pop()
            raise
        group[STEP] = 0
        group.update({key: torch.zeros((), device=group_device(group), dtype=torch.float32) for key in SEARCH_KEYS})
        group[EFFECTIVE_LR] = formed_rate(group, 1)
        for key in (HISTORY, POSITION):
            group.pop(key, None)
        add_norm_history(group, group_config(group), group_device(group))

    # Under `torch.compile` a step runs as it is, between two compiled parts.  `torch.compiler.disable` is the same, but
    # would import the compiler with this module.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        A call before the first step with only zeros for `lr` and gradients makes the states and is no step.
        `torch.distributed.checkpoint` makes such a call (section 6.3).

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a sparse gradient, one that only some processes have, or a state that does not fit the group's
                fields or the parameter's shape.  Nothing was changed.
            ValueError: a group's field was set to a value outside its range, or a parameter has another dtype now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._gradient_release is not None:
            self._gradient_release.before_close()
        for index, group in enumerate(self.param_groups):
            refuse_gradients(group, index)
        agree_on_presence(self.param_groups, self._gradients_agreed)
        opened = self._open_step or OpenStep(self.param_groups)
        for index, call in enumerate(opened.calls):
            self._form_batches(call, index, range(len(call.group["params"])))
        batches = [batch for call in opened.calls for batch in call.batches]
        if not batches and (lost := sum(p.is_meta for group in self.param_groups for p in group["params"])):
            self._warn_once("meta", f"nothing is trained: {lost} parameters are on the meta device; {_ON_META}")
        if is_rehearsal(opened.calls):
            return loss
        for device in {batch.params[0].device for batch in batches}:
            self._compiles(device)  # an error comes before anything changes
        agree_on_gradients(batches)
        for call in opened.calls:
            if not call.counts:
                continue
            call.begin()
            call.clip()
            for batch in call.batches:
                compiles = self._compiles(batch.params[0].device)
                update_batch(batch, opened.energy, self._on_update, self._stacks, compiled=compiles)
                if not batch.in_place:
                    self._owned.update(zip(batch.params, batch.states, strict=True))
            call.search(travelled_of_absent(call, self.state, self._owned))
            call.end()
            drop_warm_up_states(call, self.state, self._owned)
        if self.state_device is not None:
            # Those of a backward pass that released its gradients are in no batch any more.
            wait_for_copies({p.device for group in self.param_groups for p in group["params"]})
        self._stage_energy = opened.energy.totals()
        # What somebody took out of the optimizer is let go.
        self._owned = {p: state for p, state in self._owned.items() if self.state.get(p) is state}
        self._stacks.drop_unused()
        self._open_step = None
        if self._gradient_release is not None:
            self._gradient_release.after_close()
        tell_step(self)
        return loss

    def _form_batches(self, call: Call, group_index: int, indices: Iterable[int]) -> None:
        """Puts those of a group's arrays that take part into the call's batches; a new array gets its states."""
        if call.group[STEP] == 0:
            add_norm_history(call.group, call.config, group_device(call.group))
        elif has_norm_history(call.group) != call.config.clips_by_percentile:
            raise RuntimeError(
                f"the state of group {group_index} does not fit its percentile_clipping: "
                "stage 1 cannot be turned on or off after the first step"
            )
        for name, sentence in (*unused_entries(call.group), *self._highest_rates.risen(group_index, call.group)):
            self._warn_once(name, sentence)
        call.batches = []
        kinds: dict[Hashable, list[Place]] = {}
        # A tied weight may be listed twice; it takes one step.
        for p, index in {call.group["params"][index]: index for index in indices}.items():
            if p.grad is not None and p.numel() > 0:
                kinds.setdefault(kind(p), []).append((p, index))
        formed = [found for alike in kinds.values() for found in new_batches(call, alike, self.state_device)]
        for batch, places in sorted(formed, key=lambda found: found[1][0][1]):  # in the order of their first arrays
            call.batches.append(batch)
            for p, index in places:
                self._add_to(batch, p, group_index, index)
            batch.stack = self._stacks.of(batch)
            if batch.stack is None:
                refuse_replaced(batch, group_index, [index for _, index in places])

    def _add_to(self, batch: Batch, p: Tensor, group_index: int, index: int) -> None:
        """Adds an array to a batch."""
        call = batch.call
        held = self.state.get(p, {})
        state = held
        if self._owned.get(p) is not held:
            batch.in_place = False
            # A new dict, since an earlier state_dict may hold the old one.
            self.state[p] = state = dict(held)
        if state.keys() != batch.names and not own_states(state):
            self._tell_about_fallback(p, batch.plan, call)
            state |= batch.extent.new_state(call.warming, p.device)
        else:
            if (fitting := of_this_group(state, batch, p.device)) is not state:
                batch.in_place = False
                self.state[p] = state = fitting
            refuse_misfit(state, p, batch.names, call.group, group_index, index)
            near = batch.extent.beside(state, p.device)
            if near is not state:
                self.state[p] = state = near
        batch.params.append(p)
        batch.states.append(state)

    def state_dict(self) -> dict[str, Any]:
        """The usual state dict; with a process group it also has `automagic_torch.checkpoints.placeholders`."""
        self._refuse_open_step("no state can be saved")
        self._owned.clear()
        self._stacks.separate()
        # Before the hooks of others, which may return another form.
        first = self.register_state_dict_post_hook(as_saved, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over hyperparameters, step counters and states, in the dtypes that were saved.

        torch's own method would cast states to their parameter's dtype.  Hooks run as they do there.

        Raises:
            ValueError: the state does not fit; the message says where.  Nothing was changed.
        """
        loaded: Any = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, loaded)
            loaded = loaded if replaced is None else replaced
        groups, states = checked_state(self.param_groups, loaded, state_device=self.state_device)
        self.__setstate__({"state": states, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @property
    def config(self) -> Config:
        """The hyperparameters that the optimizer was made with, as a new `Config`; a group may have others.

        A tensor `lr` is the one that was given, which torch's schedulers fill.
        """
        config = copy(group_config(self.defaults))
        config.lr = self.defaults["lr"]
        return config

    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """`automagic_core.memory_report` of all states, and `bitsandbytes_available`.

        DTensors count with their whole size.  Arrays have no states before their first step.  Frozen parameters do not
        count, since Adam has no states for them either.
        """
        return efficiency_report(self)

    def get_learning_rates(self) -> list[float]:
        """The rate in force η̂ of every group: that of its last step, or before the first step of the first.

        It is what the last step multiplied with, ramp, search and limits included, as ``group["effective_lr"]`` is.
        Waits for the device.
        """
        return learning_rates(self.param_groups)

    def get_avg_learning_rate(self) -> float:
        """The mean of `get_learning_rates` over the groups that have parameters.  Waits for the device."""
        rates = learning_rates([group for group in self.param_groups if group["params"]] or self.param_groups)
        return sum(rates) / len(rates)

    def metrics(self) -> dict[str, float]:
        """Statistics for dashboards: `automagic_torch.watching.metrics.metrics`.  Waits for the device."""
        return metrics(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_open_step("the optimizer cannot be copied")
        self._stacks.separate()
        # A copy of a parameter has no marks, but the copied states need them.
        return {
            **super().__getstate__(),
            "marks": held_marks(self.param_groups),
            "state_device": self.state_device,
            "compiled": self.compiled,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        marks = state.pop("marks", [])
        # Version 0.1.0 saved its keys without a prefix.  What `copy.copy` shares stays shared.
        if not all(isinstance(group, ParameterGroup) for group in state["param_groups"]):
            state["param_groups"] = [with_own_keys(group) for group in state["param_groups"]]
        if "defaults" in state:
            state["defaults"] = with_own_keys(state["defaults"])
        self._open_step = None
        if self._gradient_release is not None:
            self._gradient_release.let_go()
        super().__setstate__(state)
        set_marks(self.param_groups, marks)
        for group in self.param_groups:
            add_search(group, self.state)
            add_forms(group, self.state)
            group[EFFECTIVE_LR] = kept_rate(group)
        self.__dict__.setdefault("_told", set())
        self.__dict__.setdefault("_gradients_agreed", {})
        self.__dict__.setdefault("state_device", None)
        self.__dict__.setdefault("compiled", None)
        self._owned = {}
        self._stacks = HeldStacks()
        self._highest_rates = HighestRates(self.param_groups)
        self.__dict__.setdefault("_stage_energy", {})

    def _compiles(self, device: torch.device) -> bool:
        """Whether the step of arrays on a device is compiled."""
        if self.compiled is False or (self.compiled is None and device.type != "cuda"):
            return False
        if (lack := missing_compiler(device.type)) is None:
            return True
        if self.compiled:
            raise RuntimeError(f"compiled=True: {lack}; compiled=False computes without a compiler")
        self._warn_once("compiler", f"the step is not compiled and so several times slower: {lack}")
        return False

    def _refuse_open_step(self, what: str) -> None:
        if self._open_step is not None:
            raise RuntimeError(f"{what} between a backward pass that released its gradients and the call of step()")

    def _tell_about_fallback(self, p: Tensor, plan: StatePlan, call: Call) -> None:
        """Warns once that states have 32 bits which were meant to have 8."""
        if not plan.quantized and plan_of(p, call.config, call.group[LAYOUT], eight_bit=True).quantized:
            self._warn_once("fallback", f"optimizer states are stored in 32 bits: {reason_for_32_bits(p)}")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, stacklevel=2)
