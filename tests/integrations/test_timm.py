"""its schedulers, with layer decay too; its Lookahead; saved and resumed"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from automagic_torch import AutomagicCameAMP8bit
from tests.integrations.torch_runs import backward, network, optimizer_for
from tests.torch_side.torch_helpers import same, snapshot, through_a_file

DISTRIBUTIONS = ("timm",)


if importlib.util.find_spec("timm") and not importlib.util.find_spec("torchvision"):
    # torchvision needs a build of its own for every build of torch.  timm only imports it; nothing here calls it.
    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".models")
    absent = {f"torchvision{name}": MagicMock() for name in (*names, ".models.feature_extraction")}
    absent["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (nn.Module,), {})
    sys.modules.update(absent)
    import timm.optim

    for name in absent:  # other libraries ask whether it is there
        del sys.modules[name]

timm = pytest.importorskip("timm")
scheduler_module = pytest.importorskip("timm.scheduler")

SCHEDULERS = {
    "CosineLRScheduler": {"t_initial": 6, "lr_min": 1e-5, "warmup_t": 2, "warmup_lr_init": 1e-5},
    "MultiStepLRScheduler": {"decay_t": [2, 4], "decay_rate": 0.5},
    "PlateauLRScheduler": {"patience_t": 1, "decay_rate": 0.5},
    "PolyLRScheduler": {"t_initial": 6},
    "StepLRScheduler": {"decay_t": 2, "decay_rate": 0.5, "noise_range_t": [3, 5]},
    "TanhLRScheduler": {"t_initial": 6},
    "WSDLRScheduler": {"t_initial": 6, "decay_t": 2, "warmup_t": 2, "warmup_lr_init": 1e-5},
}
STEPS = 8


class ViT(nn.Module):
    """timm's vision transformer, as small as it goes, from vectors of 16."""

    def __init__(self) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        self.vit = VisionTransformer(4, 2, in_chans=1, num_classes=16, embed_dim=16, depth=2, num_heads=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(x.reshape(-1, 1, 4, 4))


def groups_of(model: nn.Module, kind: str) -> Any:
    if kind == "layer decay":
        return timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    return timm.optim.param_groups_weight_decay(model, weight_decay=0.05)


def model_of(kind: str) -> nn.Module:
    return ViT() if kind == "layer decay" else network()


def schedule(name: str, optimizer: torch.optim.Optimizer) -> Any:
    return getattr(scheduler_module, name)(optimizer, **SCHEDULERS[name])


def advance(scheduler: Any, step: int) -> None:
    """As a training loop at the end of an epoch: the plateau scheduler gets a loss that never falls."""
    scheduler.step(step + 1, 1.0)


def test_every_scheduler_is_tried() -> None:
    names = {name for name in vars(scheduler_module) if name.endswith("LRScheduler")}
    assert names == set(SCHEDULERS)


@pytest.mark.parametrize("kind", ["weight decay", "layer decay"])
@pytest.mark.parametrize("gain", [0.0, 0.1])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_that_of_adamw_and_nothing_else_changes(name: str, gain: float, kind: str) -> None:
    # AdamW says which rates are due; the second run sets them by hand, in groups without the key `lr_scale`.
    reference = torch.optim.AdamW(groups_of(model_of(kind), kind), lr=1e-3)
    rates, scheduler = [], schedule(name, reference)
    for step in range(STEPS):
        rates.append([group["lr"] for group in reference.param_groups])
        advance(scheduler, step)
    assert len({tuple(row) for row in rates}) > 1

    def run(by_hand: bool) -> tuple[AutomagicCameAMP8bit, nn.Module]:
        groups = groups_of(model := model_of(kind), kind)
        if by_hand:
            groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        optimizer = optimizer_for(groups, search_gain=gain, edge_suppression=False, frequency_penalty=0)
        scheduler = None if by_hand else schedule(name, optimizer)
        for step in range(STEPS):
            for group, rate in zip(optimizer.param_groups, rates[step], strict=True):
                if by_hand:
                    group["lr"] = rate
                assert group["lr"] == pytest.approx(rate)
            backward(model, step)
            optimizer.step()
            if scheduler:
                advance(scheduler, step)
        return optimizer, model

    scheduled, by_hand = run(False), run(True)
    assert same(*(list(model.state_dict().values()) for _, model in (scheduled, by_hand)))
    assert same(*(optimizer.state_dict()["state"] for optimizer, _ in (scheduled, by_hand)))


@pytest.mark.parametrize("saved_at", [2, 6])
def test_a_resumed_run_is_the_undisturbed_one(saved_at: int) -> None:
    def begin() -> tuple[nn.Module, AutomagicCameAMP8bit, Any]:
        optimizer = optimizer_for(groups_of(model := ViT(), "layer decay"))
        return model, optimizer, schedule("CosineLRScheduler", optimizer)

    def go_on(parts: tuple[nn.Module, AutomagicCameAMP8bit, Any], steps: range) -> None:
        model, optimizer, scheduler = parts
        for step in steps:
            backward(model, step)
            optimizer.step()
            advance(scheduler, step)

    go_on(undisturbed := begin(), range(saved_at))
    saved = [through_a_file(part.state_dict()) for part in undisturbed]
    for part, state in zip(resumed := begin(), saved, strict=True):
        part.load_state_dict(state)
    for parts in (undisturbed, resumed):
        go_on(parts, range(saved_at, STEPS))
    assert same(snapshot(resumed[1]), snapshot(undisturbed[1]))


@pytest.mark.parametrize("saved_at", [3, 6])
def test_lookahead_keeps_its_slow_weights_in_our_state(saved_at: int) -> None:
    """It averages every second step; it keeps the slow weights in the state of each parameter."""

    def begin() -> tuple[nn.Module, Any]:
        return (model := network()), timm.optim.Lookahead(optimizer_for(model.parameters()), alpha=0.5, k=2)

    def go_on(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()

    model, optimizer = begin()
    go_on(model, optimizer, range(saved_at))
    saved = through_a_file(optimizer.state_dict())
    slow = [state["lookahead_slow_buff"] for state in saved["state"].values()]
    assert len(slow) == len(list(model.parameters()))
    resumed_model, resumed = begin()
    resumed_model.load_state_dict(through_a_file(model.state_dict()))
    resumed.load_state_dict(saved)
    go_on(model, optimizer, range(saved_at, STEPS))
    go_on(resumed_model, resumed, range(saved_at, STEPS))
    assert same(snapshot(resumed._base_optimizer), snapshot(optimizer._base_optimizer))
