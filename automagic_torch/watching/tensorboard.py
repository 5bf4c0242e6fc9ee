"""`MetricsLogger`: writes a torch optimizer's metrics for TensorBoard and `python -m automagic_core.plot`."""

from __future__ import annotations

from typing import Any

from automagic_core.watching.run_log import RunLog
from automagic_torch.watching.metrics import metrics
from automagic_torch.watching.run_facts import losses_to_host


class MetricsLogger(RunLog):
    """Writes ``optimizer.metrics()`` and your own scalars into a run's folder, as the core's `RunLog` does.

    Args:
        run_dir: the folder; ``metrics.jsonl`` and TensorBoard's event files go there.  None writes nothing.  In a
            distributed run give the folder in one process and None in all others, and call `log` in all of them:
            statistics of DTensors are gathered there.
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
            **scalars: numbers, or tensors of one element, such as ``loss=loss``.  None is left out.  One with the name
                of a metric takes its place.

        Returns:
            The record without the step; None if none was due.

        Raises:
            TypeError: another optimizer.
            ValueError: a scalar of more than one element.
        """
        if not self.is_due(step):
            return None
        given = {name: value for name, value in scalars.items() if value is not None}
        record = metrics(optimizer)
        record |= zip(given, losses_to_host(list(given.values()), list(given)), strict=True)
        self.write(step, record)
        return record
