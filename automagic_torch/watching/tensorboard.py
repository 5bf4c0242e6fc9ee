"""`MetricsLogger`: writes a torch optimizer's metrics for TensorBoard and `python -m automagic_core.plot`."""

from __future__ import annotations

from typing import Any

from automagic_core.watching.run_log import RunLog
from automagic_torch.watching.metrics import metrics
from automagic_torch.watching.run_facts import losses_to_host


class MetricsLogger(RunLog):
    """Writes ``optimizer.metrics()`` and your own scalars into a run's folder, as the core's `RunLog` does.

    Args:
        run_dir: the folder; ``metrics.jsonl`` and TensorBoard's event files go there.  In a distributed run only one
            process should write.
        every: steps between two records.
        tensorboard: write event files too, where the package is installed.

    Example:
        >>> with MetricsLogger("runs/first", every=100) as logger:
        ...     for step, batch in enumerate(batches, 1):
        ...         loss = train_step(batch)
        ...         logger.log(step, optimizer, loss=loss)
    """

    def log(self, step: int, optimizer: Any, **scalars: Any) -> dict[str, float] | None:
        """Writes one record if one is due; else it reads nothing and does not wait.

        Args:
            step: how many steps are over.  The first call writes, then every multiple of `every`.
            optimizer: an `AutomagicCameAMP8bit`, after its step (and its scheduler's).
            **scalars: numbers, or tensors of one element, such as ``loss=loss``.

        Returns:
            The record without the step; None if none was due.

        Raises:
            TypeError: another optimizer.
            ValueError: a scalar of more than one element.
        """
        if not self.is_due(step):
            return None
        record = dict(zip(scalars, losses_to_host(list(scalars.values())), strict=True))
        record |= metrics(optimizer)
        self.write(step, record)
        return record
