"""`optimizer.step()` inside of `torch.compile`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automagic_torch import AutomagicCameAMP8bit
from tests.torch_side.torch_helpers import same


def run(compiled: bool) -> list[torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = AutomagicCameAMP8bit(model.parameters(), lr=1e-3, warmup_steps=2, force_8bit=True, min_8bit_size=16)

    def train_step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = torch.compile(train_step, backend="eager") if compiled else train_step
    for number in range(4):
        step(torch.randn(2, 8, generator=torch.Generator().manual_seed(number)))
    return [p.detach() for p in model.parameters()]


def test_a_compiled_train_step_gives_the_bits_of_a_plain_one() -> None:
    assert same(run(compiled=True), run(compiled=False))


def test_a_graph_without_breaks_gets_torchs_own_error() -> None:
    torch._dynamo.reset()
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AutomagicCameAMP8bit([p], lr=1e-3, optim_bits=32)
    step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step()
    assert optimizer.param_groups[0]["automagic_step"] == 0
