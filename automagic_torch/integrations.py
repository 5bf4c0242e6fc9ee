"""Callbacks for training libraries and a planner for checkpoints; what each needs is imported when it is.

>>> from automagic_torch.integrations import TrainerRateCallback
>>> trainer = Trainer(model, args, callbacks=[TrainerRateCallback()], optimizer_cls_and_kwargs=(...))

`TrainerRateCallback` needs transformers, `LightningRateCallback` lightning or pytorch_lightning.  Both mark adapters
and embeddings before training begins, and log the rate in force as ``effective_lr``.  `OldNamesLoadPlanner` reads
directories that `torch.distributed.checkpoint` wrote with version 0.1.0.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from automagic_torch.checkpoints.old_names_planner import OldNamesLoadPlanner
    from automagic_torch.lightning_callback import LightningRateCallback
    from automagic_torch.trainer_callback import TrainerRateCallback

__all__ = ["LightningRateCallback", "OldNamesLoadPlanner", "TrainerRateCallback"]

_HOMES = {
    "LightningRateCallback": "lightning_callback",
    "OldNamesLoadPlanner": "checkpoints.old_names_planner",
    "TrainerRateCallback": "trainer_callback",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"automagic_torch.{_HOMES[name]}"), name)
