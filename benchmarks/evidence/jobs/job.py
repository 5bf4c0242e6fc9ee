"""What a job is: a base that is made once, and trainings that start from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.lora import LoRALinear

Base = dict[str, Any]
"""What a job keeps on disk: tensors, strings and numbers."""


@dataclass
class Training(ABC):
    """One training run: a model, its adapters, and batches that depend on the seed alone.

    Attributes:
        model: everything but the trained arrays is frozen.
        adapters: whose learned products are measured afterwards.
        generator: draws the batches.
    """

    model: nn.Module
    adapters: list[LoRALinear]
    generator: torch.Generator

    def parameters(self) -> list[nn.Parameter]:
        """The arrays that are trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @abstractmethod
    def loss(self) -> Tensor:
        """Loss of the next batch, 0-d, with its graph."""

    @abstractmethod
    def validation_loss(self) -> float:
        """Mean loss over a set that is the same for every run."""

    def further_results(self) -> dict[str, float]:
        """Other figures of the trained model that people would ask for, by name."""
        return {}


class Job(ABC):
    """A job.  Class attributes:

    Attributes:
        name: in file names.
        title: in the report.
        description: what is trained on what, a sentence for the report.
        unit: of the loss.
        steps: of one run.
    """

    name: str
    title: str
    description: str
    unit: str
    steps: int

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Every number that decides a run's result, plain values only; a result under other settings is void."""

    @abstractmethod
    def build_base(self) -> Base:
        """Makes the base: takes up to minutes, gives the same every time."""

    @abstractmethod
    def start(self, base: Base, seed: int) -> Training:
        """A training from its beginning.

        Args:
            base: of `build_base`; not to be changed.
            seed: decides the adapters' start and the batches.
        """


def cosine(step: int, steps: int, ramp: int) -> float:
    """Factor on the rate of 0-based step `step`: `ramp` steps up (0: none), half a cosine down to 0."""
    rise = min(1.0, (step + 1) / ramp) if ramp else 1.0
    return rise * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))))
