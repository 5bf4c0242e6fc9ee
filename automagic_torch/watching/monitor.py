"""`AdaptiveTrainingMonitor`: watches a run with a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from automagic_core.watching.monitor import TrainingMonitor
from automagic_core.watching.suggestions import RunRates
from automagic_torch.cameamp.state_sums import count, state_sums
from automagic_torch.watching.hardware import cuda_memory_use
from automagic_torch.watching.own_optimizer import own_optimizer
from automagic_torch.watching.run_facts import check_loss, devices, losses_to_host, run_rates


class AdaptiveTrainingMonitor(TrainingMonitor):
    """Watches the losses, the skipped steps and the memory of a run: `automagic_core.TrainingMonitor`.

    `update` never waits for the device.  Losses come to the host together when a verdict is asked for.

    Args:
        optimizer: an `AutomagicCameAMP8bit`.
        window_size: how many losses are judged, at least 10.
        memory_use: returns the part of the device's memory that is in use; by default what torch has reserved of the
            fullest of the parameters' CUDA devices.

    Raises:
        TypeError: another optimizer.
        ValueError: a `window_size` that is no integer of at least 10.

    Example:
        >>> monitor = AdaptiveTrainingMonitor(optimizer)
        >>> for batch in batches:
        ...     loss = train_step(batch)
        ...     monitor.update(loss)
        ...     if monitor.updates % 100 == 0:
        ...         wrong, issue = monitor.should_adjust_config()
        ...         if wrong:
        ...             print(issue, monitor.get_adjustment_suggestion(issue))
    """

    def __init__(
        self,
        optimizer: Optimizer,
        window_size: int = 50,
        *,
        memory_use: Callable[[], float | None] | None = None,
    ) -> None:
        self.optimizer: Optimizer = own_optimizer(optimizer)
        super().__init__(window_size, memory_use or (lambda: cuda_memory_use(devices(self.optimizer))))

    def update(self, loss: Any) -> None:
        """Records the loss of one step, after ``optimizer.step()``.

        Args:
            loss: a number, or a tensor of one element on any device; its graph is not kept.

        Raises:
            ValueError: a loss of more than one element.
        """
        # A copy, since the tensor may be written into again, as with CUDA graphs.
        self._record(check_loss(loss).detach().clone() if isinstance(loss, Tensor) else float(loss))

    def _to_floats(self, losses: list[Any]) -> list[float]:
        return losses_to_host(losses)

    def _skipped_now(self) -> list[Tensor]:
        return state_sums(self.optimizer, "skipped_steps")

    def _count(self, skipped: list[Tensor]) -> int:
        return count(skipped)

    def _rates(self) -> RunRates | None:
        return run_rates(self.optimizer)
