"""The monitor, the health check and the memory table read a real torch optimizer; the core's tests test their rules."""

import gc
import weakref

import pytest
import torch

from automagic_torch import (
    AdaptiveTrainingMonitor,
    AutomagicCameAMP8bit,
    analyze_memory_usage,
    check_training_health,
)
from tests.torch_side.torch_helpers import SMALL, parameters, run, set_gradients


def stepped(steps=0, **fields):
    optimizer = AutomagicCameAMP8bit(parameters([(8, 6), (5,)]), **SMALL | fields)
    run(optimizer, range(1, steps + 1))
    return optimizer


def feed(monitor, losses):
    for loss in losses:
        monitor.update(loss)
    return monitor.should_adjust_config()


def noisy(levels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return levels * (1 + 0.02 * torch.randn(levels.shape, generator=generator))


FALLING, FLAT, RISING = torch.exp(-torch.arange(60) / 40), torch.ones(60), torch.exp(torch.arange(60) / 40)


@pytest.mark.parametrize(
    ("losses", "issue"),
    [
        (noisy(FALLING), None),
        (noisy(FLAT), "convergence_stall"),
        (noisy(RISING), "divergence"),
        (noisy(FALLING).bfloat16(), None),
        (noisy(RISING).double().reshape(-1, 1), "divergence"),
        (noisy(FALLING).tolist(), None),
        ([*noisy(FALLING), torch.tensor(torch.nan)], "divergence"),
    ],
)
def test_verdicts(losses, issue):
    assert feed(AdaptiveTrainingMonitor(stepped()), losses) == (issue is not None, issue)


def test_a_loss_is_kept_without_its_graph_and_as_it_was():
    monitor = AdaptiveTrainingMonitor(stepped(), window_size=10)
    weight = torch.nn.Parameter(torch.ones(3))
    activation = weight * 2
    loss = activation.sum()
    seen = weakref.ref(activation)
    monitor.update(loss)
    loss.detach().fill_(torch.nan)  # as a captured graph writes its next loss into the same tensor
    del activation, loss
    gc.collect()
    assert seen() is None
    assert monitor.should_adjust_config() == (False, None)
    with pytest.raises(ValueError, match=r"a loss of shape \(3,\) is not one number"):
        monitor.update(weight)


def test_updates_do_not_read_the_losses():
    # A meta tensor has no values: reading it fails.
    monitor = AdaptiveTrainingMonitor(stepped(steps=2))
    for _ in range(200):
        monitor.update(torch.ones((), device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        monitor.should_adjust_config()


def test_skipped_steps_are_seen():
    optimizer = stepped(steps=3)
    params = optimizer.param_groups[0]["params"]
    set_gradients(params, 4)
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    monitor = AdaptiveTrainingMonitor(optimizer, window_size=10)
    assert feed(monitor, FALLING[:5]) == (False, None), "skipped before the monitor began"
    optimizer.step()
    assert feed(monitor, FALLING[5:6]) == (True, "skipped_steps")
    assert feed(monitor, FALLING[6:20]) == (False, None)
    health = check_training_health(optimizer, FALLING)
    assert (health["status"], health["issues"]) == ("critical", ["skipped_steps"])  # 2 of 10 steps of single arrays
    assert health["suggestions"][0].startswith("2 of 10 steps")


def test_memory_pressure_is_what_the_reader_says():
    monitor = AdaptiveTrainingMonitor(stepped(), memory_use=lambda: 0.95)
    assert feed(monitor, FALLING) == (True, "memory_pressure")
    optimizer = stepped()
    changed = monitor.get_adjustment_suggestion("memory_pressure")
    assert changed.pop("text")
    fields = {name: optimizer.param_groups[0][name] for name in optimizer.defaults}
    group = AutomagicCameAMP8bit(parameters(), **fields | changed).param_groups[0]
    assert (group["automagic_factored"], group["automagic_min_8bit_size"]) == ("all", 1024)


def test_suggestions_are_about_the_rate_in_use():
    optimizer = stepped(steps=6)  # the warm-up of 4 steps is over
    optimizer.add_param_group({"params": parameters([(3,)]), "lr": 0.05})  # takes no step
    group = optimizer.param_groups[0]
    found = group["lr"] * float(group["automagic_log_rate_scale"].exp())
    assert found > 1.2 * 1e-5, "the search found something"
    monitor = AdaptiveTrainingMonitor(optimizer)
    lower = monitor.get_adjustment_suggestion("divergence")
    assert lower["max_lr"] == pytest.approx(found / 3, rel=0.05)  # rounded to two digits
    higher = monitor.get_adjustment_suggestion("convergence_stall")
    assert higher["lr"] == pytest.approx(3 * group["lr"], rel=0.05)
    with pytest.raises(ValueError, match="issue = None is not one of"):
        monitor.get_adjustment_suggestion(None)


@pytest.mark.parametrize(
    ("losses", "status", "issues"),
    [
        (noisy(FALLING), "healthy", []),
        (list(noisy(FLAT)), "warning", ["convergence_stall"]),
        (noisy(RISING), "critical", ["divergence"]),
    ],
)
def test_health(losses, status, issues):
    health = check_training_health(stepped(steps=2), losses)
    assert (health["status"], health["issues"]) == (status, issues)


def test_memory_table(capsys):
    optimizer = stepped()
    assert "No states yet" in analyze_memory_usage(optimizer)
    run(optimizer, range(1, 3))
    table = analyze_memory_usage(optimizer)
    assert capsys.readouterr().out == ""
    assert analyze_memory_usage(optimizer, show=True) + "\n" == capsys.readouterr().out
    report = optimizer.get_memory_efficiency_report()
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert rows["all states"][0] == f"{report['state_bytes']:,}"
    assert (rows["parameters"][0], rows["with 8-bit states"][0]) == ("53", "48")
    # Codes of 48 elements, 5 floats of the bias, and the scale of the one block.
    assert rows["exp_avg"][0] == str(48 + 4 + 5 * 4)
    assert table.splitlines()[-1] == "Very good: 90.6% of the parameters have 8-bit states."


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim_bits": 32}, "All states are in 32 bits: optim_bits=32 asks for it."),
        (
            {"force_8bit": False},
            "All states are in 32 bits: outside CUDA",
        ),
        ({"min_8bit_size": 49}, "Warning: only 0.0% of the parameters have 8-bit states."),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer states are stored in 32 bits")
def test_memory_table_says_why_there_are_no_8_bits(fields, said):
    assert analyze_memory_usage(stepped(steps=1, **fields)).splitlines()[-1].startswith(said)
