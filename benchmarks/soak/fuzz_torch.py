"""A random run in PyTorch."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.soak.fuzz_cases import Case

DTYPES = ("float32", "bfloat16", "float16", "float64")


class TorchRunner:
    """The optimizer of a case."""

    flushes = False
    everywhere = False
    counts_from_first_gradient = True

    def __init__(self, case: Case) -> None:
        self.params = [torch.nn.Parameter(_tensor(w)) for w in case.weights()]
        for p, array in zip(self.params, case.arrays, strict=True):
            p._is_embedding, p._is_lora_layer = array.embedding, array.lora  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = make(case.fields, self.params, case.layout)
        self.updates: dict[torch.Tensor, np.ndarray] = {}
        self.optimizer._on_update = self._keep

    def _keep(self, p: torch.Tensor, update: torch.Tensor) -> None:
        self.updates[p] = update.numpy().copy()

    def step(self, gradients: list[Any]) -> list[np.ndarray | None]:
        """As `Runner.step`."""
        self.updates.clear()
        for p, g in zip(self.params, gradients, strict=True):
            p.grad = None if g is None else _tensor(g)
        with warnings.catch_warnings():
            # Without force_8bit it says that states have 32 bits on a CPU.
            warnings.simplefilter("ignore")
            self.optimizer.step()
        return [self.updates.get(p) for p in self.params]

    def weights(self) -> list[np.ndarray]:
        """As `Runner.weights`."""
        return [_array(p.detach()) for p in self.params]

    def states(self, i: int) -> dict[str, np.ndarray]:
        """As `Runner.states`."""
        return {name: x.numpy().copy() for name, x in self.optimizer.state.get(self.params[i], {}).items()}


def make(fields: dict[str, Any], params: Any, layout: str = "torch") -> AutomagicCameAMP8bit:
    """The optimizer; raises what it raises."""
    return AutomagicCameAMP8bit(params, layout=layout, **fields)


def refuses(fields: dict[str, Any]) -> str:
    """The error's text, or an empty one where the fields are taken."""
    try:
        make(fields, [torch.nn.Parameter(torch.zeros(2))])
    except ValueError as error:
        return str(error)
    return ""


def _tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(x.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def _array(p: torch.Tensor) -> np.ndarray:
    if p.dtype == torch.bfloat16:
        import ml_dtypes

        return p.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
    return p.numpy().copy()
