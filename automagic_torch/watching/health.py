"""`check_training_health`: judges whether a run with a torch optimizer is healthy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from automagic_core.watching.health import OptimizerFacts, TrainingHealth, training_health
from automagic_torch.cameamp.state_sums import count, state_sums
from automagic_torch.watching.hardware import cuda_memory_use
from automagic_torch.watching.own_optimizer import own_optimizer
from automagic_torch.watching.run_facts import devices, losses_to_host, run_rates


def check_training_health(optimizer: Optimizer, losses: Sequence[Any], threshold_ratio: float = 0.1) -> TrainingHealth:
    """Judges a run by its losses, its optimizer and its device: `automagic_core.training_health`.

    Args:
        optimizer: an `AutomagicCameAMP8bit`.
        losses: one for each step, in order: numbers, or tensors of one element.
        threshold_ratio: in (0, 1).  From the first half of `losses` to the second, a rise by more than this part of the
            loss is divergence (critical), and a fall by less is a stall (warning), unless noise explains it.  0.1 suits
            a whole run, 0.01 its last few hundred steps.

    Returns:
        A dictionary with ``"status"`` (``"healthy"``, ``"warning"``, ``"critical"``), ``"issues"`` (names as in
        `AdaptiveTrainingMonitor`) and ``"suggestions"`` (sentences in the same order).

    Raises:
        TypeError: another optimizer.
        ValueError: `threshold_ratio` out of range, or a loss of more than one element.
    """
    optimizer = own_optimizer(optimizer)
    facts = OptimizerFacts(
        skipped=count(state_sums(optimizer, "skipped_steps")),
        taken=count(state_sums(optimizer, "age")),
        memory_use=cuda_memory_use(devices(optimizer)),
        rates=run_rates(optimizer),
    )
    return training_health(losses_to_host(losses), facts, threshold_ratio)
