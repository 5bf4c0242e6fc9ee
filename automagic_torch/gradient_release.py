"""`release_gradients`: the backward pass updates every array and frees its gradient (docs/gradient_release.md)."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from automagic_torch.arrays.dtensors import is_dtensor
from automagic_torch.cameamp.call import OpenStep
from automagic_torch.cameamp.groups import group_config, parameter_name, refuse_gradients
from automagic_torch.optimizer import AutomagicCameAMP8bit
from automagic_torch.steps.array_step import update_batch
from automagic_torch.watching.own_optimizer import own_optimizer


def release_gradients(optimizer: AutomagicCameAMP8bit) -> GradientRelease:
    """Lets every backward pass update each parameter as soon as its gradient is there, and free the gradient.

    ``optimizer.step()`` then closes the step: it moves the rate search and uses the gradients that no hook has seen.
    Every array is computed with alone, so sums may round differently where it would have been in a batch (section 8).
    The rate and the fields in force are those at the beginning of the backward pass.

    Args:
        optimizer: with any groups.  Groups that are added later are released too, and parameters that are unfrozen
            later from the next call of `step` on.

    Returns:
        A handle; its `remove` makes the optimizer an ordinary one again.

    Raises:
        TypeError: not an `AutomagicCameAMP8bit`, for instance a wrapper around one.
        ValueError: a group with stage 1 (`percentile_clipping` below 100), a DTensor, or a parameter that another
            optimizer releases.  Nothing was changed.
        RuntimeError: the optimizer releases gradients already, or there are several processes, which average gradients
            after they were used.

    A backward pass raises a RuntimeError for a second gradient of a parameter before `step` (accumulation), after a
    backward pass that ended with an error, for a sparse gradient, and where a group's fields do not fit any more.
    `step` raises one under a `GradScaler`, and where an array that was updated has a gradient again.

    Nobody can see ``clip_grad_norm_`` between the two: it finds no gradients, returns 0 and clips nothing.
    docs/gradient_release.md says what works instead; the callbacks of `automagic_torch.integrations` refuse it.
    """
    # Lightning's wrapper has the class of what it wraps.
    if not isinstance(optimizer, AutomagicCameAMP8bit) or own_optimizer(optimizer) is not optimizer:
        raise TypeError(
            f"gradients can be released for an AutomagicCameAMP8bit, not for {type(optimizer).__name__}; "
            "a wrapper's own optimizer is the one to give"
        )
    if optimizer._gradient_release is not None:
        raise RuntimeError("this optimizer releases its gradients already")
    release = GradientRelease(optimizer)
    release.watch()
    optimizer._gradient_release = release
    # A GradScaler shows itself to optimizers that say so.
    optimizer._step_supports_amp_scaling = True
    return release


def refuse_clipping(optimizers: Iterable[Any], limit: float | None, name: str) -> None:
    """Raises a ValueError if a training library is to clip gradients that an optimizer releases.

    Args:
        optimizers: optimizers or wrappers of them.
        limit: to which the library clips; 0 and None: it does not.
        name: of the library's argument.
    """
    for optimizer in optimizers if limit else ():
        try:
            own = own_optimizer(optimizer)
        except TypeError:
            continue
        if own._gradient_release is not None:
            raise ValueError(f"{name} = {limit} would clip nothing: gradients are released before; valid: 0")


class GradientRelease:
    """The hooks of one optimizer's parameters; made by `release_gradients`."""

    def __init__(self, optimizer: AutomagicCameAMP8bit) -> None:
        # Hooks live as long as their parameters.  A dropped optimizer must not go on training them.
        self._optimizer = weakref.ref(optimizer)
        self._handles: list[Any] = []
        self._lock = threading.RLock()  # autograd has a thread for every device
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._updated: set[Tensor] = set()
        self._running: weakref.ref[Callable[[], None]] | None = None
        self._removed = False

    def remove(self) -> None:
        """Removes all hooks.  A step that a backward pass began is closed by `step` as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._removed = True
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._gradient_release is self and optimizer._open_step is None:
            optimizer._gradient_release = None
            del optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def watch(self) -> None:
        """Gives a hook to every parameter that needs one and has none.

        Raises:
            ValueError, RuntimeError: as `release_gradients`.  No hook was added.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        _refuse_processes()
        new = []
        for group_index, group in enumerate(optimizer.param_groups):
            _refuse_stage_1(group, group_index)
            for index, p in enumerate(group["params"]):
                owner = _owner(p)
                if is_dtensor(p) or owner not in (None, self):
                    why = "is a DTensor" if owner is None else "has its gradient released by another optimizer"
                    raise ValueError(f"{parameter_name(group, group_index, index)} {why}: gradients cannot be released")
                if p.requires_grad and owner is None:
                    new.append(p)
        self._handles += [p.register_post_accumulate_grad_hook(_Hook(self)) for p in dict.fromkeys(new)]

    def update(self, p: Tensor) -> None:
        """Updates p and frees its gradient; autograd calls it."""
        optimizer = self._optimizer()
        with self._lock, torch.no_grad():
            if optimizer is None or p.grad is None:
                return
            opened = optimizer._open_step or self._begin(optimizer)
            if p not in self._places:  # no longer in a group
                return
            self._refuse_mixing(p)
            group_index, index = self._places[p]
            call = opened.calls[group_index]
            if p.grad.layout != torch.strided:
                refuse_gradients(call.group, group_index)
            optimizer._form_batches(call, group_index, (index,))
            self._updated.add(p)
            call.begin()
            for batch in call.batches:
                update_batch(batch, opened.energy, optimizer._on_update, optimizer._stacks)
            p.grad = None

    def before_close(self) -> None:
        """Refuses what cannot be closed, and brings the ballots into the order of an ordinary step.

        Raises:
            RuntimeError: a `GradScaler`, or an updated array with another gradient.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if optimizer.__dict__.pop("found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler multiplied the loss, but the gradients were used and released in the backward pass: "
                "use bfloat16, or no scaler"
            )
        if optimizer._open_step is None:
            return
        again = next((p for p in self._updated if p.grad is not None), None)
        if again is not None:
            raise RuntimeError(
                f"{self._name(again)} was updated in the backward pass and has a gradient again: something writes "
                "gradients after the hook (DistributedDataParallel does), or a backward pass was refused. "
                "optimizer.zero_grad() and then optimizer.step() close this step"
            )
        for call in optimizer._open_step.calls:
            call.ballots.sort(key=lambda ballot: self._places[ballot.batch.params[0]])

    def after_close(self) -> None:
        """Frees the gradients that `step` found, and looks for parameters that were unfrozen."""
        optimizer = self._optimizer()
        assert optimizer is not None
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
        if not self.let_go():
            self.watch()

    def let_go(self) -> bool:
        """Ends what `remove` could not end while a step was open; whether it was removed."""
        if self._removed:
            self.remove()
        return self._removed

    def _begin(self, optimizer: AutomagicCameAMP8bit) -> OpenStep:
        """Opens the step of all groups."""
        _refuse_processes()
        opened = OpenStep(optimizer.param_groups)
        for index, call in enumerate(opened.calls):
            _refuse_stage_1(call.group, index)
            optimizer._form_batches(call, index, ())  # its checks of the group
        self._places = {
            p: (group_index, index)
            for group_index, call in enumerate(opened.calls)
            for index, p in enumerate(call.group["params"])
        }
        self._updated, self._running = set(), None
        optimizer._open_step = opened
        return opened

    def _refuse_mixing(self, p: Tensor) -> None:
        """Refuses a backward pass after one that failed, and a second gradient of p; else follows the running pass."""
        if self._running is not None and self._running() is None and not self._ended:
            raise RuntimeError(
                f"an earlier backward pass ended with an error after it had updated {len(self._updated)} parameters. "
                "optimizer.zero_grad() and then optimizer.step() close that step; so does loading a checkpoint"
            )
        if p in self._updated:
            raise RuntimeError(
                f"{self._name(p)} has a second gradient, but the first one was used and released in the backward pass: "
                "gradients cannot be accumulated. Call optimizer.step() after every backward pass"
            )
        if self._running is None or self._ended:
            self._follow()

    def _follow(self) -> None:
        """Notes how the running backward pass ends.

        Autograd calls the function at the end, and drops it without a call if the pass fails.
        """

        def end() -> None:
            self._ended = True

        self._ended = False
        torch.autograd.Variable._execution_engine.queue_callback(end)
        self._running = weakref.ref(end)

    def _name(self, p: Tensor) -> str:
        optimizer, (group_index, index) = self._optimizer(), self._places[p]
        assert optimizer is not None
        return parameter_name(optimizer.param_groups[group_index], group_index, index)


class _Hook:
    """The hook of a parameter.  It does not keep its release alive."""

    def __init__(self, release: GradientRelease) -> None:
        self.release = weakref.ref(release)

    def __call__(self, p: Tensor) -> None:
        release = self.release()
        if release is not None:
            release.update(p)


def _owner(p: Tensor) -> GradientRelease | None:
    """The release whose hook p has."""
    hooks: Mapping[int, Any] = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    owners = [hook.release() for hook in hooks.values() if isinstance(hook, _Hook)]
    return next((owner for owner in owners if owner is not None and owner._optimizer() is not None), None)


def _refuse_stage_1(group: Mapping[str, Any], index: int) -> None:
    config = group_config(group)
    if config.clips_by_percentile:
        raise ValueError(
            f"group {index} has percentile_clipping = {config.percentile_clipping}: the norm of all gradients is "
            "not known while they are released; valid: 100"
        )


def _refuse_processes() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
        if count > 1:
            raise RuntimeError(
                f"gradients cannot be released in a group of {count} processes: "
                "they would be used before the processes have averaged them"
            )
