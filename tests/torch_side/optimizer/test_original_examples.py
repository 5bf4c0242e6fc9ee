"""What the documentation of the original `Automagic_CameAMP_Improved_8Bit` shows as code, told anew."""

from __future__ import annotations

import ast
import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import automagic_torch
from automagic_cameamp_improved_8bit import (
    BITSANDBYTES_AVAILABLE,
    AdaptiveTrainingMonitor,
    Automagic_CameAMP_Improved_8Bit,
    Improved8BitOptimizerConfig,
    OptimizationProfiles,
    analyze_memory_usage,
    benchmark_optimizer,
    check_training_health,
    create_improved_8bit_optimizer,
    get_adaptive_config,
    get_hardware_optimized_config,
)
from automagic_torch.arrays.marks import is_lora
from tests.torch_side.torch_helpers import same

PROFILES = ("memory_optimized", "quality_optimized", "balanced")
KEYS = {"total_parameters", "8bit_parameters", "32bit_parameters", "memory_saved_mb", "compression_ratio"}
NO_8BIT = 99_999_999


class Adapted(nn.Module):
    """A frozen layer and its adapter, which is marked by hand."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.base.weight.requires_grad = False
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)
        for layer in (self.lora_A, self.lora_B):
            layer.weight._is_lora_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.1 * self.lora_B(self.lora_A(x))


def adapted_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(64, 96, rank=32), nn.ReLU(), Adapted(96, 10, rank=16))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    data = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 64, generator=data), torch.randint(0, 10, (32,), generator=data)
    losses = []
    for _ in steps:
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_adapter_marked_by_hand_trains_and_the_frozen_layer_stays() -> None:
    model = adapted_model()
    before = [p.detach().clone() for p in model.parameters()]
    fields: dict[str, Any] = {"lr": 1e-3, "edge_suppression": True, "lora_rank_penalty": True, "verbose": True}
    optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), **fields)
    assert isinstance(optimizer, torch.optim.Optimizer)
    losses = train(model, optimizer, range(25))
    assert losses[-1] < losses[0]
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) is not p.requires_grad
        assert is_lora(p) is p.requires_grad


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_gives_fields_that_can_be_changed_and_handed_over(profile: str) -> None:
    config = getattr(OptimizationProfiles, profile)()
    assert isinstance(config, Improved8BitOptimizerConfig)
    config.force_8bit = True
    config.min_8bit_size = 1024
    model = adapted_model()
    optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), **config.__dict__)
    train(model, optimizer, range(2))
    report = optimizer.get_memory_efficiency_report()
    assert report.keys() >= KEYS | {"bitsandbytes_available"}
    assert report["bitsandbytes_available"] is BITSANDBYTES_AVAILABLE is True
    large = sum(p.numel() for p in model.parameters() if p.requires_grad and p.numel() >= 1024)
    assert report["8bit_parameters"] == large > 0
    assert report["total_parameters"] == report["8bit_parameters"] + report["32bit_parameters"]
    assert report["compression_ratio"] == report["8bit_parameters"] / report["total_parameters"]
    assert report["memory_saved_mb"] > 0
    written = f"{report['total_parameters']:,} {report['memory_saved_mb']:.2f} MB {report['compression_ratio']:.2%}"
    assert written.endswith("%")

    config.min_8bit_size = NO_8BIT  # as its documentation switches 8 bits off
    model = adapted_model()
    optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), **config.__dict__)
    train(model, optimizer, range(1))
    assert optimizer.get_memory_efficiency_report()["8bit_parameters"] == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_by_name_with_fields_beside_it(profile: str) -> None:
    """As a training script hands over what stood on its command line."""
    words = [f"profile={profile}", "lr=2e-4", "verbose=True", "edge_penalty=0.12", "min_8bit_size=2048"]
    given: dict[str, Any] = {}
    for word in words:
        key, value = word.split("=")
        try:
            given[key] = ast.literal_eval(value)
        except ValueError:
            given[key] = value
    lr = given.pop("lr")
    made = Automagic_CameAMP_Improved_8Bit(adapted_model().parameters(), lr=lr, **given)
    config = made.config
    assert (config.lr, config.edge_penalty, config.min_8bit_size) == (2e-4, 0.12, 2048)
    of_profile = getattr(OptimizationProfiles, profile)()
    for name in ("edge_suppression", "spatial_awareness", "lora_rank_penalty", "force_8bit", "factored"):
        assert getattr(config, name) == getattr(of_profile, name)
    created = create_improved_8bit_optimizer(adapted_model().parameters(), lr=lr, **given)
    assert created.config == config
    config.lr = 1e-6
    assert made.config.lr == 2e-4, "a copy"


def test_config_is_what_was_given_also_without_a_rate() -> None:
    assert Automagic_CameAMP_Improved_8Bit([nn.Parameter(torch.ones(2))]).config == Improved8BitOptimizerConfig()
    assert Automagic_CameAMP_Improved_8Bit([nn.Parameter(torch.ones(2))], lr=0.0).config.lr == 0.0


def test_a_saved_run_goes_on(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, Automagic_CameAMP_Improved_8Bit]:
        model = adapted_model()
        return model, create_improved_8bit_optimizer(model.parameters(), lr=1e-3, force_8bit=True, min_8bit_size=1024)

    model, optimizer = begin()
    losses = train(model, optimizer, range(3))
    path = tmp_path / "checkpoint_8bit.pth"
    checkpoint = {"epoch": 3, "loss": losses[-1], "model_state_dict": model.state_dict()}
    torch.save({**checkpoint, "optimizer_state_dict": optimizer.state_dict()}, path)
    again, resumed = begin()
    checkpoint = torch.load(path)
    again.load_state_dict(checkpoint["model_state_dict"])
    resumed.load_state_dict(checkpoint["optimizer_state_dict"])
    assert checkpoint["epoch"] == 3
    assert train(again, resumed, range(3)) == train(model, optimizer, range(3))
    assert same(again.state_dict(), model.state_dict())


def test_a_config_for_the_machine() -> None:
    for config in (get_adaptive_config(), get_hardware_optimized_config()):
        model = adapted_model()
        train(model, Automagic_CameAMP_Improved_8Bit(model.parameters(), **config.__dict__), range(1))


def test_quantized_step_by_step_with_a_new_optimizer_for_each_part() -> None:
    """Its `progressive_quantization_training`: 32 bits, then a threshold that falls, then all in 8 bits."""
    model, shares = adapted_model(), []
    for profile, size in (("quality_optimized", NO_8BIT), ("balanced", int(8192 * 0.5 + 2048 * 0.5)), (PROFILES[0], 0)):
        config = getattr(OptimizationProfiles, profile)()
        config.min_8bit_size = size or config.min_8bit_size
        config.force_8bit = True  # outside CUDA
        optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), **config.__dict__)
        train(model, optimizer, range(2))
        shares.append(optimizer.get_memory_efficiency_report()["compression_ratio"])
    assert shares[0] == 0 < shares[2]
    assert shares == sorted(shares)


def test_its_helpers_take_the_same_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted_model()
    optimizer = Automagic_CameAMP_Improved_8Bit(model.parameters(), lr=1e-3)
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=50)
    losses = train(model, optimizer, range(25))
    for loss in losses:
        monitor.update(loss)
    assert monitor.should_adjust_config() == (False, None)
    for _ in range(monitor.window_size):
        monitor.update(1.0)
    should_adjust, issue = monitor.should_adjust_config()
    assert (should_adjust, issue) == (True, "convergence_stall")
    assert f"{monitor.get_adjustment_suggestion(issue)}"
    assert f"{monitor.get_adjustment_suggestion('memory_pressure')}"

    health = check_training_health(optimizer, losses, threshold_ratio=0.1)
    assert health.keys() == {"status", "issues", "suggestions"}
    analyze_memory_usage(optimizer)
    before = copy.deepcopy(model.state_dict())
    assert benchmark_optimizer(model, optimizer, num_steps=1)["mean_ms"] > 0
    assert same(model.state_dict(), before)


def test_the_module_has_names_of_the_package_and_no_others() -> None:
    import automagic_cameamp_improved_8bit as original

    for name in original.__all__:
        of_package = "Config" if name == "Improved8BitOptimizerConfig" else name
        assert getattr(original, name) is getattr(automagic_torch, of_package)
    assert list(inspect.signature(AdaptiveTrainingMonitor).parameters)[:2] == ["optimizer", "window_size"]
    assert inspect.signature(check_training_health).parameters["threshold_ratio"].default == 0.1
    assert inspect.signature(benchmark_optimizer).parameters["num_steps"].default == 10
