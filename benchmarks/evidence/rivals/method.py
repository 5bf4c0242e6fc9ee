"""What a run needs of an optimizer beside `step`: its schedule, the weights it is judged by, the rate it found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.evidence.jobs.job import cosine


class Method:
    """An optimizer in a run.

    Args:
        optimizer: built, over all trained parameters.
        steps: of the run.
        rate: what the schedule multiplies: the peak rate, or 1 where the optimizer finds its own; None: no schedule.
        ramp: steps in which the rate rises, before it falls to 0 in half a cosine.
        found: under this name the groups hold the rate that was found.
    """

    def __init__(
        self, optimizer: Optimizer, steps: int, *, rate: float | None = None, ramp: int = 0, found: str | None = None
    ) -> None:
        self.optimizer = optimizer
        self.steps, self.rate, self.ramp, self.found = steps, rate, ramp, found

    def set_rate(self, step: int) -> None:
        """Sets the rate of a 0-based step."""
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * cosine(step, self.steps, self.ramp)

    def step(self) -> None:
        """One step with the gradients that the parameters hold."""
        self.optimizer.step()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Within it the parameters are those that a validation loss is taken of."""
        yield

    def found_rate(self) -> float | None:
        """The rate that was found, without the schedule; None where nothing searches."""
        return None if self.found is None else float(self.optimizer.param_groups[0][self.found])

    def tensors(self) -> Iterator[Tensor]:
        """Everything it keeps beside the parameters."""
        groups = self.optimizer.param_groups
        yield from _within([value for group in groups for name, value in group.items() if name != "params"])
        yield from _within(dict(self.optimizer.state))


class ScheduleFree(Method):
    """One that trains at one point and is judged at another: `optimizer.eval()` and `train()` move between them."""

    def __init__(self, optimizer: Any, steps: int, found: str | None = None) -> None:
        super().__init__(optimizer, steps, found=found)
        optimizer.train()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """At the average."""
        modes: Any = self.optimizer
        modes.eval()
        yield
        modes.train()


class Averaged(Method):
    """One that is judged by an average of its iterates.

    Args:
        averager: has `step()` and `averaged_model`, a list of parameters.
    """

    def __init__(self, optimizer: Optimizer, steps: int, averager: Any, parameters: list[Parameter]) -> None:
        super().__init__(optimizer, steps)
        self.averager, self.parameters = averager, parameters

    def step(self) -> None:
        """A step, and the average of it."""
        super().step()
        self.averager.step()

    @contextmanager
    def judged(self) -> Iterator[None]:
        """At the average."""
        own = [p.detach().clone() for p in self.parameters]
        self._put(self.averager.averaged_model)
        yield
        self._put(own)

    def tensors(self) -> Iterator[Tensor]:
        """With the average."""
        yield from super().tensors()
        yield from self.averager.averaged_model

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


def _within(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _within(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _within(part)
