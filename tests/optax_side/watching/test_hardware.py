"""What is read of a JAX device, and that `automagic_8bit` takes the configuration that follows."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from automagic_optax import automagic_8bit, get_adaptive_config, get_hardware_optimized_config, memory_report
from automagic_optax.watching.hardware import device_facts, device_memory_use
from tests.optax_side.small import params, train

GIB = 2**30


class Device:
    """What `automagic_optax.watching.hardware` looks at."""

    def __init__(self, platform: str, stats: dict[str, int] | None, capability: str | None = None) -> None:
        self.platform = platform
        self._stats = stats
        if capability is not None:
            self.compute_capability = capability

    def memory_stats(self) -> dict[str, int] | None:
        if self._stats == {}:
            raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")
        return self._stats


CARD = Device("gpu", {"bytes_limit": 6 * GIB, "bytes_in_use": GIB}, "8.6")


@pytest.mark.parametrize(
    ("device", "facts"),
    [
        (CARD, (8 * GIB, (8, 6))),  # JAX manages three quarters
        (Device("gpu", {"bytes_limit": 6 * GIB}, "12.0"), (8 * GIB, (12, 0))),
        (Device("rocm", {"bytes_limit": 48 * GIB}, "gfx90a"), (64 * GIB, None)),
        (Device("tpu", {"bytes_limit": 16 * GIB}), (16 * GIB, None)),
        (Device("gpu", None, "7.5"), (None, (7, 5))),
        (Device("gpu", {}, "7.5"), (None, (7, 5))),
        (Device("gpu", {"largest_alloc_size": 1}, "7.5"), (None, (7, 5))),
        (Device("cpu", {"bytes_limit": 16 * GIB}), (None, None)),
        (object.__new__(type("Bare", (), {"platform": "metal"})), (None, None)),
    ],
)
def test_what_is_read(device: Any, facts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert device_facts(device) == facts


def test_the_fraction_that_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert device_facts(CARD)[0] == 12 * GIB
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "1.0")
    assert device_facts(CARD)[0] == 6 * GIB


def test_memory_use(monkeypatch: pytest.MonkeyPatch) -> None:
    fuller = Device("gpu", {"bytes_limit": 10, "bytes_in_use": 9})
    for devices, expected in (([CARD], 1 / 6), ([CARD, fuller], 0.9), ([Device("cpu", None)], None)):
        monkeypatch.setattr(jax, "local_devices", lambda devices=devices: devices)
        assert device_memory_use() == expected


def test_the_first_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [CARD])
    assert get_adaptive_config().profile == "balanced"
    assert get_adaptive_config(device=Device("cpu", None)).optim_bits == 32
    config = get_hardware_optimized_config(warmup_steps=3)
    assert (config.profile, config.min_8bit_size, config.warmup_steps) == ("balanced", 4096, 3)


@pytest.mark.parametrize(("device", "eight_bit"), [(CARD, 4096), (Device("cpu", None), 0)], ids=["card", "cpu"])
@pytest.mark.parametrize("choose", [get_adaptive_config, get_hardware_optimized_config])
def test_automagic_8bit_takes_the_whole_configuration(choose: Any, device: Any, eight_bit: int) -> None:
    fields = dict(choose(device, warmup_steps=2, max_lr=1e-2, lr=1e-4).__dict__)
    report = memory_report(automagic_8bit(fields.pop("lr"), **fields).init(params()))
    assert report["8bit_parameters"] == eight_bit
    assert report["total_parameters"] == sum(w.size for w in jax.tree.leaves(params()))


def test_the_configuration_without_an_accelerator_trains() -> None:
    fields = dict(get_adaptive_config(Device("cpu", None), lr=1e-3, warmup_steps=0).__dict__)
    weights, state = train(automagic_8bit(fields.pop("lr"), **fields), 1)
    assert all((new != old).any() for new, old in zip(jax.tree.leaves(weights), jax.tree.leaves(params()), strict=True))
    assert memory_report(state)["8bit_parameters"] == 0
