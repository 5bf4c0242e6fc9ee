"""A pytest plugin that runs tests written for the CPU on CUDA: ``python -m pytest -p benchmarks.gpu.on_cuda``

Tensors that a test makes are on the device, drawn on the host by its generator; ``.numpy()`` brings them back.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from automagic_torch import AutomagicCameAMP8bit

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
_FACTORIES: set[Any] = {
    *(torch.tensor, torch.as_tensor, torch.from_numpy, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.arange, torch.linspace),
}
_TO_HOST: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}


class OnDevice(TorchFunctionMode):
    """Within it factories without a device give tensors on `DEVICE`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, its operands or its result moved."""
        del types
        kwargs = kwargs or {}
        if func in _TO_HOST:
            return func(args[0].detach().cpu(), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func in _FACTORIES and kwargs.get("device") is None and isinstance(result, torch.Tensor):
            needs_gradient = result.requires_grad
            return result.detach().to(DEVICE).requires_grad_(needs_gradient)
        return result


_OF_A_CPU = (
    *("test_the_number_of_operations_does_not_grow_with_the_arrays", "32 bits outside CUDA"),
    "test_errors_and_the_warning_name_what_is_wrong",
)
"""Tests whose names hold one of these say what holds on a CPU alone."""


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leaves out what a GPU does otherwise on purpose."""
    items[:] = [item for item in items if not any(part in item.name for part in _OF_A_CPU)]


def pytest_configure() -> None:
    """From now on, to the end of the process."""
    # Hundreds of small forms of batch would be compiled; the tests written for CUDA try the compiled step.
    defaults: Any = AutomagicCameAMP8bit.__init__.__kwdefaults__
    defaults["compiled"] = False
    OnDevice().__enter__()
