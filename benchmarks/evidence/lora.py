"""Low-rank adapters around frozen linear layers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + x Aᵀ Bᵀ with W and b frozen; B starts at 0, so that it starts as the layer it wraps.

    Attributes:
        A: (rank, in), normal with variance 1 / in.
        B: (out, rank).

    Both carry ``_is_lora_layer = True``, the mark that `encourage_low_rank` looks for (section 4).
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        start = torch.randn(rank, base.in_features, generator=generator) / math.sqrt(base.in_features)
        self.A = nn.Parameter(start)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        for factor in (self.A, self.B):
            factor._is_lora_layer = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.A), self.B)


def adapt(model: nn.Module, names: Iterable[str], rank: int, generator: torch.Generator) -> list[LoRALinear]:
    """Freezes `model` and wraps the named linear layers in place; returns the adapters in the order of `names`.

    Args:
        names: dotted names as `get_submodule` takes them.
    """
    model.requires_grad_(False)
    adapters = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} is a {type(layer).__name__}; only nn.Linear can be adapted")
        adapters.append(LoRALinear(layer, rank, generator))
        setattr(model.get_submodule(parent), leaf, adapters[-1])
    return adapters
