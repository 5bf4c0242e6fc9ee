"""Which configuration follows from which device."""

from __future__ import annotations

import pytest

from automagic_core import Config
from automagic_core.config.hardware import GB, adaptive_config, hardware_optimized_config

GIB = 2**30
KEPT_IN_32 = {"profile": "memory_optimized", "optim_bits": 32, "force_8bit": False, "factored": "all"}


def check(config: Config, **expected: object) -> None:
    assert {name: getattr(config, name) for name in expected} == expected
    config.validate()


@pytest.mark.parametrize(
    ("memory", "profile"),
    [
        (4 * GIB, "memory_optimized"),
        (8 * GB - 1, "memory_optimized"),
        (8 * GB, "balanced"),
        # What cards sold with 8, 16 and 24 GB report is a little less than that many GiB.
        (int(7.78 * GIB), "balanced"),
        (16 * GB - 1, "balanced"),
        (int(15.7 * GIB), "quality_optimized"),
        (int(23.6 * GIB), "quality_optimized"),
    ],
)
def test_adaptive(memory: int, profile: str) -> None:
    check(adaptive_config(memory, (8, 6)), profile=profile, optim_bits=8)
    check(adaptive_config(memory), profile=profile, optim_bits=8)


@pytest.mark.parametrize(
    ("memory", "capability", "profile", "size"),
    [
        (6 * GB - 1, (8, 6), "memory_optimized", 2048),
        (80 * GB, (6, 1), "memory_optimized", 2048),
        (80 * GB, (7, 0), "quality_optimized", 8192),
        (6 * GB, (7, 5), "balanced", 4096),
        (12 * GB - 1, (8, 9), "balanced", 4096),
        (12 * GB, (8, 9), "quality_optimized", 8192),
        (12 * GB, (12, 0), "quality_optimized", 8192),
        (16 * GB, None, "quality_optimized", 8192),
    ],
)
def test_hardware_optimized(memory: int, capability: tuple[int, int] | None, profile: str, size: int) -> None:
    check(hardware_optimized_config(memory, capability), profile=profile, min_8bit_size=size, optim_bits=8)


def test_no_accelerator_and_unknown_memory() -> None:
    check(adaptive_config(None, None), **KEPT_IN_32)
    check(hardware_optimized_config(None, None), min_8bit_size=2048, **KEPT_IN_32)
    check(adaptive_config(None, (9, 0)), profile="memory_optimized", optim_bits=8)
    check(hardware_optimized_config(None, (9, 0)), profile="memory_optimized", optim_bits=8, min_8bit_size=2048)


def test_fields_given_win() -> None:
    check(adaptive_config(None, None, lr=1e-4, optim_bits=8), profile="memory_optimized", optim_bits=8, lr=1e-4)
    check(hardware_optimized_config(80 * GB, (9, 0), min_8bit_size=1), profile="quality_optimized", min_8bit_size=1)
    with pytest.raises(ValueError, match="unknown field learning_rate"):
        adaptive_config(8 * GB, None, learning_rate=1e-3)
