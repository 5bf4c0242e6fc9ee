"""`AdaptiveTrainingMonitor`: watches a run for divergence, stalls, skipped steps and memory pressure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from automagic_core import Config
from automagic_core.watching.monitor import TrainingMonitor
from automagic_core.watching.suggestions import RunRates
from automagic_optax.arrays.containers import is_nnx
from automagic_optax.cameamp.find_states import opt_state_of
from automagic_optax.cameamp.state_sums import count, state_sums
from automagic_optax.watching.hardware import device_memory_use
from automagic_optax.watching.run_facts import check_loss, losses_to_host, progress, run_rates


class AdaptiveTrainingMonitor(TrainingMonitor):
    """Watches the losses, the optimizer state and the device of a run, with `automagic_core.TrainingMonitor`.

    `update` never waits for the device.  Losses stay on the device and are fetched together when a verdict is asked
    for.  Of the optimizer state only sums are kept, so a training step may donate it.

    Args:
        optimizer: an optimizer state that contains a `ScaleByCameampState`, however it is wrapped, a ``TrainState``, or
            an ``nnx.Optimizer``, which is read as it changes.
        window_size: how many losses are judged, at least 10.
        config: the hyperparameters in use, with `lr`; an optimizer state does not know them.  Without them suggestions
            about the learning rate have no numbers.
        memory_use: returns the share of the device's memory in use; by default ``bytes_in_use`` over ``bytes_limit`` of
            the fullest local device.

    Raises:
        ValueError: a `window_size` that is no integer of at least 10; a state that is not this optimizer's.

    Example:
        >>> monitor = AdaptiveTrainingMonitor(opt_state)
        >>> for step, batch in enumerate(batches):
        ...     params, opt_state, loss = train_step(params, opt_state, batch)
        ...     monitor.update(loss, opt_state)
        ...     if step % 100 == 99:
        ...         wrong, issue = monitor.should_adjust_config()
        ...         if wrong:
        ...             print(issue, monitor.get_adjustment_suggestion(issue))
    """

    def __init__(
        self,
        optimizer: Any,
        window_size: int = 50,
        *,
        config: Config | None = None,
        memory_use: Callable[[], float | None] | None = None,
    ) -> None:
        self.config = config
        self._live = optimizer if is_nnx(optimizer, "Optimizer") else None
        self._read(optimizer)
        super().__init__(window_size, memory_use or device_memory_use)

    def update(self, loss: Any, opt_state: Any = None) -> None:
        """Notes the loss of one step, outside jit.

        Args:
            loss: a number or an array of one element.
            opt_state: the state after the step, read once in a tenth of the window.  Without it skipped steps are not
                seen, unless the monitor was made with an ``nnx.Optimizer``.

        Raises:
            ValueError: a loss of more than one element or without a value yet; a state that is not this optimizer's.
        """
        check_loss(loss)
        if opt_state is not None and self._notes_skipped:
            self._read(opt_state)
        self._record(loss if isinstance(loss, jax.Array) else float(loss))

    def _read(self, optimizer: Any) -> None:
        opt_state = opt_state_of(optimizer)
        self._skipped, self._progress = state_sums(opt_state, "skipped_steps"), progress(opt_state)

    def _to_floats(self, losses: list[Any]) -> list[float]:
        return losses_to_host(losses)

    def _skipped_now(self) -> list[jax.Array]:
        if self._live is not None:
            self._read(self._live)
        return self._skipped

    def _count(self, skipped: list[jax.Array]) -> int:
        return count(skipped)

    def _rates(self) -> RunRates | None:
        if self._live is not None:
            self._read(self._live)
        return run_rates(self._progress, self.config)
