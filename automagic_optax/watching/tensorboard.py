"""`MetricsLogger`: writes metrics for TensorBoard and for `python -m automagic_core.plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from automagic_core import Config
from automagic_core.watching.run_log import RunLog
from automagic_optax.watching.metrics import metrics
from automagic_optax.watching.run_facts import losses_to_host


class MetricsLogger(RunLog):
    """Writes `metrics` and your own scalars into a run's folder.

    Args:
        run_dir: the folder; ``metrics.jsonl`` and TensorBoard's event files go there.  None writes nothing.  In a
            distributed run give the folder in one process and None in all others, and call `log` in all of them.
        every: steps between two records.
        learning_rate, config: as for `metrics`; without `config` no
            ``rate/...``, only ``learning_rate`` and ``rate_factor/...``.
        tensorboard: write event files too, where the package is installed; PyTorch is not needed.

    Example:
        >>> with MetricsLogger("runs/first", every=100, config=Config(lr=1e-5, warmup_steps=200)) as logger:
        ...     for step, batch in enumerate(batches, 1):
        ...         params, opt_state, loss = train_step(params, opt_state, batch)
        ...         logger.log(step, opt_state, loss=loss)
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        every: int = 100,
        *,
        learning_rate: Any = None,
        config: Config | None = None,
        tensorboard: bool = True,
    ) -> None:
        super().__init__(run_dir, every, tensorboard=tensorboard)
        self.learning_rate = learning_rate
        self.config = config

    def log(self, step: int, opt_state: Any, *, params: Any = None, **scalars: Any) -> dict[str, float] | None:
        """Writes one record if one is due, outside jit.  If none is due, it reads nothing and does not wait.

        Args:
            step: how many steps are over.  The first call writes, then every multiple of `every`.
            opt_state: the state after the step, an ``nnx.Optimizer`` or a ``TrainState``.
            params: as for `metrics`.
            **scalars: numbers, or arrays of one element, such as ``loss=loss``.  None is left out.  One with the name
                of a metric takes its place.

        Returns:
            The record without the step; None if none was due.

        Raises:
            ValueError: as `metrics`; a scalar of more than one element.
        """
        if not self.is_due(step):
            return None
        given = {name: value for name, value in scalars.items() if value is not None}
        record = metrics(opt_state, self.learning_rate, config=self.config, params=params)
        record |= zip(given, losses_to_host(list(given.values()), list(given)), strict=True)
        self.write(step, record)
        return record
