"""The memory is really saved: a transformer of over 10 M parameters in PyTorch, counted from the tensors held."""

import pytest
import torch

from automagic_torch import create_improved_8bit_optimizer
from benchmarks.memory import transformer

LIMITS = {"memory_optimized": 13.5, "balanced": 26.0, "quality_optimized": 39.0}
WARM_UP_POINTS = 1.6


@pytest.mark.parametrize(
    "profile",
    [
        "memory_optimized",
        pytest.param("balanced", marks=pytest.mark.slow),
        pytest.param("quality_optimized", marks=pytest.mark.slow),
    ],
)
def test_state_bytes_against_adam(profile):
    like = transformer(layers=3, width=512)
    params = [torch.nn.Parameter(torch.full(shape, 0.01)) for shape in like.values()]
    assert sum(p.numel() for p in params) >= 10_000_000
    assert len(params) >= 40
    optimizer = create_improved_8bit_optimizer(params, profile=profile, lr=1e-4, warmup_steps=2, force_8bit=True)
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        report = optimizer.get_memory_efficiency_report()
        shares.append(100 * report["state_bytes"] / report["adam_state_bytes"])
    assert report["total_parameters"] == sum(p.numel() for p in params)
    assert report["compression_ratio"] > 0.99
    assert shares[0] <= LIMITS[profile] + WARM_UP_POINTS
    assert shares[0] > shares[-1], "the warm-up holds more"
    assert shares[-1] <= LIMITS[profile]
