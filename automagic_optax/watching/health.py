"""`check_training_health`: judges whether a run is healthy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from automagic_core import Config
from automagic_core.watching.health import OptimizerFacts, TrainingHealth, training_health
from automagic_optax.cameamp.find_states import opt_state_of
from automagic_optax.cameamp.state_sums import count, state_sums
from automagic_optax.watching.hardware import device_memory_use
from automagic_optax.watching.run_facts import losses_to_host, progress, run_rates


def check_training_health(
    optimizer: Any, losses: Sequence[Any], threshold_ratio: float = 0.1, *, config: Config | None = None
) -> TrainingHealth:
    """Judges a run by its losses, its optimizer state and its device, with `automagic_core.training_health`.

    Args:
        optimizer: an optimizer state that contains a `ScaleByCameampState`, however it is wrapped, or an
            ``nnx.Optimizer`` or a ``TrainState``.
        losses: the losses to be judged, in order: numbers, or arrays of one element.
        threshold_ratio: in (0, 1).  The second half of `losses` is compared with the first.  A rise by more than this
            share of the loss is divergence (critical), and a fall by less is a stall (warning), both only if noise
            does not explain it.  0.1 suits a whole run, 0.01 its last few hundred steps.
        config: the hyperparameters in use, with `lr`, for suggestions with numbers.

    Returns:
        A dictionary with ``"status"`` (``"healthy"``, ``"warning"``, ``"critical"``), ``"issues"`` (names as in
        `AdaptiveTrainingMonitor`) and ``"suggestions"`` (sentences in the same order).

    Raises:
        ValueError: `threshold_ratio` out of range, a loss of more than one element, or a state that is not this
            optimizer's.
    """
    opt_state = opt_state_of(optimizer)
    facts = OptimizerFacts(
        skipped=count(state_sums(opt_state, "skipped_steps")),
        taken=count(state_sums(opt_state, "age")),
        memory_use=device_memory_use(),
        rates=run_rates(progress(opt_state), config),
    )
    return training_health(losses_to_host(losses), facts, threshold_ratio)
