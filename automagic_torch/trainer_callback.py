"""`TrainerRateCallback`, for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback

from automagic_torch.arrays.marks import mark_embeddings, mark_lora
from automagic_torch.gradient_release import refuse_clipping
from automagic_torch.watching.logged_rates import logged_rates


class TrainerRateCallback(TrainerCallback):
    """Marks adapters and embeddings before training, and logs the rate in force as ``effective_lr``.

    ``learning_rate`` in the Trainer's log is what the scheduler set, without ramp and search.  ``effective_lr`` is
    added to every record that has a loss: to ``trainer.state.log_history``, and to what callbacks behind this one get.
    The reporters of ``report_to`` stand in front of the callbacks that a Trainer is given; `put_first` changes that.

    Marks: `mark_lora` and `mark_embeddings` are called when the Trainer is made, so that a checkpoint loads with them,
    and again when training begins.  Earlier marks stay.  A Trainer that makes its model anew (``model_init``) loads a
    checkpoint in between: `put_first` marks every model that it makes, and without it `model_init` must mark it.
    Give the callback in ``callbacks=`` or by `put_first`: given by ``add_callback``, and under FSDP2, which makes new
    parameters, a checkpoint is loaded before the marks are there, so with `stable_emb` it does not load.

    Example:
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(AutomagicCameAMP8bit, {"lr": 1e-4}))
        >>> TrainerRateCallback().put_first(trainer)
    """

    def put_first(self, trainer: Any) -> None:
        """Makes this the first callback of a Trainer, so that its reporters show the rate too.

        The models that the Trainer makes by its ``model_init`` are marked from now on.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]
        _mark(trainer.model)
        if trainer.model_init is not None:
            # Not `model_init`, whose arguments the Trainer counts.
            trainer.call_model_init = _marking(trainer.call_model_init)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the model, if there is one yet."""
        _mark(kwargs.get("model"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the model that is trained, and refuses to clip gradients that are released."""
        _mark(kwargs.get("model"))
        refuse_clipping([kwargs.get("optimizer")], args.max_grad_norm, "max_grad_norm")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the rate in force to a record of training.  Waits for the device, as the Trainer's loss does."""
        logs = kwargs.get("logs")
        if logs is None or "loss" not in logs:
            return
        rates = {name: float(rate) for name, rate in logged_rates([kwargs.get("optimizer")]).items()}
        logs.update(rates)
        if state.log_history:
            state.log_history[-1].update(rates)


def _marking(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def marked(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        _mark(model)
        return model

    return marked


def _mark(model: Any) -> None:
    if isinstance(model, nn.Module):
        mark_lora(model)
        mark_embeddings(model)
