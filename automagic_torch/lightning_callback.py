"""`LightningRateCallback`, for PyTorch Lightning under either of its names."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from automagic_torch.arrays.marks import mark_embeddings, mark_lora
from automagic_torch.gradient_release import refuse_clipping
from automagic_torch.watching.logged_rates import logged_rates

_Callback: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning").Callback


class LightningRateCallback(_Callback):  # type: ignore[misc]
    """Marks adapters and embeddings before training, and logs the rate in force as ``effective_lr``.

    Lightning's `LearningRateMonitor` logs ``group["lr"]``, what the scheduler set, without ramp and search.  This logs
    the mean over all groups, and each group as ``effective_lr/<number>`` where there are several, after every batch.
    Lightning decides which batches reach a logger (`log_every_n_steps`); no batch waits for the device.

    `mark_lora` and `mark_embeddings` are called before the optimizers are made, and again when fitting starts, for
    layers that `configure_model` makes.  Earlier marks stay.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Marks the module."""
        if stage == "fit":
            _mark(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Marks the module again, and refuses to clip gradients that are released."""
        _mark(pl_module)
        refuse_clipping(trainer.optimizers, trainer.gradient_clip_val, "gradient_clip_val")

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Logs the rates of the last step."""
        pl_module.log_dict(logged_rates(trainer.optimizers), on_step=True, on_epoch=False)


def _mark(module: Any) -> None:
    mark_lora(module)
    mark_embeddings(module)
