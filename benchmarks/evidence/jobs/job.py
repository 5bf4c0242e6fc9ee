"""What a job is: a base that is made once, and trainings that start from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence.lora import LoRALinear

Base = dict[str, Any]
"""What a job keeps on disk: tensors, strings and numbers."""


@dataclass
class Training(ABC):
    """One training run in PyTorch: a model, its adapters, and batches that depend on the seed alone.

    Attributes:
        model: everything but the trained arrays is frozen.
        adapters: whose learned products are measured afterwards; none where everything is trained.
        generator: draws the batches.
        clip: the largest norm of all gradients together; None: they are not clipped.
    """

    model: nn.Module
    adapters: list[LoRALinear]
    generator: torch.Generator
    clip: float | None = field(default=None, kw_only=True)

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
        family: name of the job at its own length and batch.
        heading: in the report.
        unit: of the loss.
        rate: where a grid of rates begins.
        framework: ``"torch"`` or ``"jax"``.
        pictured: whether it is in the first picture; such a job trains adapters.

    Args:
        sizes: a named tuple of plain values, with `steps` and `batch`: every number that decides a run's result.
        variation: what it has of another length or batch than the family's own, as in ``"x3"``.
    """

    family: str
    heading: str
    unit: str
    rate: float
    framework = "torch"
    pictured = False

    def __init__(self, sizes: Any, variation: str = "") -> None:
        self.sizes = sizes
        self.variation = variation
        self.steps: int = sizes.steps
        self.name = "-".join(filter(None, [self.family, variation]))
        self.title = ", ".join(filter(None, [self.heading, variation]))

    @property
    @abstractmethod
    def description(self) -> str:
        """What is trained on what, a sentence for the report."""

    def settings(self) -> dict[str, Any]:
        """Every number that decides a run's result, plain values only; a result under other settings is void."""
        settings: dict[str, Any] = self.sizes._asdict()
        return settings

    def base_settings(self) -> dict[str, Any]:
        """Those that decide the base: jobs of a family that differ in others share it."""
        return {name: value for name, value in self.settings().items() if name not in ("steps", "batch")}

    @abstractmethod
    def build_base(self) -> Base:
        """Makes the base: takes up to minutes, gives the same every time."""

    @abstractmethod
    def start(self, base: Base, seed: int) -> Any:
        """A training from its beginning: a `Training`, or what takes its place in JAX.

        Args:
            base: of `build_base`; not to be changed.
            seed: decides the start and the batches.
        """


def variations(job: Job, *, longer: bool = True) -> list[Job]:
    """The job at three times its length (with `longer`), and at a quarter and four times its batch."""
    sizes, kind = job.sizes, type(job)
    others = [("x3", sizes._replace(steps=3 * sizes.steps))] if longer else []
    others += [(f"batch{batch}", sizes._replace(batch=batch)) for batch in (sizes.batch // 4, 4 * sizes.batch)]
    return [kind(changed, name) for name, changed in others]


def cosine(step: int, steps: int, ramp: int) -> float:
    """Factor on the rate of 0-based step `step`: `ramp` steps up (0: none), half a cosine down to 0."""
    rise = min(1.0, (step + 1) / ramp) if ramp else 1.0
    return rise * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps, dtype=torch.float64))))
