"""Reports about another optimizer are refused, those about a wrapped one are of the one inside."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from automagic_torch import (
    AdaptiveTrainingMonitor,
    AutomagicCameAMP8bit,
    analyze_memory_usage,
    check_training_health,
    metrics,
)

REPORTS = {
    "metrics": metrics,
    "health": lambda optimizer: check_training_health(optimizer, [1.0] * 20),
    "monitor": AdaptiveTrainingMonitor,
    "memory": analyze_memory_usage,
}


@pytest.mark.parametrize("report", REPORTS)
def test_another_optimizer_is_named(report: str) -> None:
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="optimizer is a AdamW; valid: an AutomagicCameAMP8bit"):
        REPORTS[report](adam)


@pytest.mark.parametrize("report", REPORTS)
def test_a_wrapped_optimizer_is_found(report: str) -> None:
    optimizer = AutomagicCameAMP8bit([torch.nn.Parameter(torch.ones(3))])
    REPORTS[report](SimpleNamespace(optimizer=SimpleNamespace(_optimizer=optimizer)))
