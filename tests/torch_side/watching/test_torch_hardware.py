"""What is read of a CUDA device, and that the optimizer takes the configuration that follows."""

from types import SimpleNamespace

import pytest
import torch

from automagic_core.arrays.group_keys import fields_of
from automagic_torch import AutomagicCameAMP8bit, get_adaptive_config, get_hardware_optimized_config
from automagic_torch.watching.hardware import cuda_memory_use
from tests.torch_side.torch_helpers import parameters, run

CARDS = [SimpleNamespace(total_memory=n * 2**30, major=8, minor=6) for n in (4, 24)]


def _index(device):
    return device if isinstance(device, int) else torch.device(device).index


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: CARDS[_index(device)])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: [2**30, 20 * 2**30][device.index])


def test_the_current_card_or_the_one_named(two_cards):
    assert get_adaptive_config().profile == "quality_optimized"
    assert get_adaptive_config(device="cuda:0").profile == "memory_optimized"
    assert get_adaptive_config(device=0).optim_bits == 8
    assert get_adaptive_config(device="cpu").optim_bits == 32
    assert get_hardware_optimized_config().min_8bit_size == 8192
    assert get_hardware_optimized_config(device=torch.device("cuda", 0)).min_8bit_size == 2048
    CARDS[1].major = 6
    try:
        assert get_hardware_optimized_config().profile == "memory_optimized"
    finally:
        CARDS[1].major = 8


def test_memory_use_is_that_of_the_fullest_card(two_cards):
    devices = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)]
    assert cuda_memory_use(devices) == 20 / 24
    assert cuda_memory_use(devices[:2]) == 1 / 4
    assert cuda_memory_use(devices[:1]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("choose", [get_adaptive_config, get_hardware_optimized_config])
def test_the_optimizer_takes_the_whole_configuration(choose):
    config = choose(lr=1e-3, max_lr=1e-2, warmup_steps=2)
    optimizer = AutomagicCameAMP8bit(parameters([(80, 64)]), **config.__dict__)
    assert fields_of(optimizer.param_groups[0]) == config.__dict__
    run(optimizer, range(1, 4))
    report = optimizer.get_memory_efficiency_report()
    # 32 bits, but everything that can be factored is: one float32 per parameter and the statistics of 144 lines.
    assert report["8bit_parameters"] == 0
    assert report["state_bytes"] < 4.5 * 80 * 64


def test_the_optimizer_takes_the_configuration_of_a_card(two_cards):
    config = get_adaptive_config(device=0)
    optimizer = AutomagicCameAMP8bit(parameters([(80, 64)]), **config.__dict__)
    group = optimizer.param_groups[0]
    fields = fields_of(group)
    assert (fields["profile"], fields["factored"], fields["force_8bit"]) == ("memory_optimized", "all", True)
