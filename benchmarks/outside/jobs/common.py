"""What the jobs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.evidence.jobs.job import Base, Job, Training
from examples.digits_diffusion import data

HELD_OUT_SEED = 12345
"""Draws what the held-out loss needs, the same in every run."""
HELD_OUT_SHARE = 0.25
"""Of the digits."""


class OutsideJob(Job):
    """A job; `heading` says in a few words what it is.  Further class attributes:

    Attributes:
        own_name: where it is not the family's, for jobs that share a base.
        defaults: the sizes, where none are given.
    """

    own_name = ""
    defaults: Any

    def __init__(self, sizes: Any = None) -> None:
        super().__init__(self.defaults if sizes is None else sizes)
        self.name = self.own_name or self.family

    @property
    def description(self) -> str:
        return f"{self.heading}, {self.steps} steps"

    def build_base(self) -> Base:
        return {}


@dataclass
class FromFunctions(Training):
    """A training whose two losses are functions.

    Attributes:
        next_loss: of the next batch.
        held_out_loss: evaluated without dropout and without gradients.
    """

    next_loss: Callable[[], Tensor]
    held_out_loss: Callable[[], Tensor]

    def loss(self) -> Tensor:
        return self.next_loss()

    @torch.no_grad()
    def validation_loss(self) -> float:
        self.model.eval()
        try:
            return float(self.held_out_loss())
        finally:
            self.model.train()


def from_rows(
    model: nn.Module, generator: torch.Generator, loss: Callable[[Tensor | slice], Tensor], known: int, batch: int
) -> FromFunctions:
    """A training whose `loss` is of rows of a table: batches from the first `known` of them, the others held out."""
    return FromFunctions(
        model,
        [],
        generator,
        lambda: loss(torch.randint(known, (batch,), generator=generator)),
        lambda: loss(slice(known, None)),
    )


def seeded(seed: int) -> torch.Generator:
    """A generator of its own; torch's is seeded too: it draws the weights and what dropout leaves out."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def fixed() -> torch.Generator:
    """A generator that draws the same whenever it is asked for."""
    return torch.Generator().manual_seed(HELD_OUT_SEED)


class Digits(NamedTuple):
    """Images (n, 8, 8) between 0 and 1, and the digit that each shows."""

    images: Tensor
    labels: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Digits:
        """`count` random ones."""
        chosen = torch.randint(len(self.images), (count,), generator=generator)
        return Digits(self.images[chosen], self.labels[chosen])

    def where(self, keep: Tensor) -> Digits:
        """Those for which `keep` is true."""
        return Digits(self.images[keep], self.labels[keep])


@cache
def digits() -> tuple[Digits, Digits]:
    """Those to learn from, and those held out."""
    parts = data.split(data.load(), HELD_OUT_SHARE, seed=0)
    known, held_out = (
        Digits(torch.tensor(part.images).view(-1, data.SIDE, data.SIDE) / 2 + 0.5, torch.tensor(part.labels))
        for part in parts
    )
    return known, held_out


def moved_and_noisy(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """The images rolled by up to one pixel each way, all alike, with noise of standard deviation `noise`."""
    down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return torch.roll(images, (down, right), (1, 2)) + noise * torch.randn(images.shape, generator=generator)
