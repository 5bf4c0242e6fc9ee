"""`optimizer.metrics()` and its callback against what steps really do."""

import json
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from automagic_torch import AutomagicCameAMP8bit, MetricsLogger
from automagic_torch.cameamp.learning_rate import Rates
from tests.torch_side.torch_helpers import SMALL, parameters, run, set_gradients

SHAPES = ((8, 70), (4, 3, 3, 3), (3, 10), (10, 3), (5,))  # one array without rows: its rate counts once


def optimizer_of(shapes=SHAPES, *, names=False, **fields):
    params = parameters(shapes)
    for p in params[2:4]:
        p._is_lora_layer = True
    params = [(f"layer{i}.weight", p) for i, p in enumerate(params)] if names else params
    return AutomagicCameAMP8bit(params, **{**SMALL, "percentile_clipping": 50, **fields})


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])  # before the first vote, within the warm-up of 4, and after it
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"spatial_awareness": False},
        {"lr_mask_gain": 0},
        {"search_gain": 0},
        {"max_lr": 1.02e-3},
        {"lr": torch.tensor(2e-3)},
    ],
)
def test_rates_are_those_of_the_next_step(steps, fields, monkeypatch):
    optimizer = optimizer_of(**fields)
    run(optimizer, range(1, steps + 1))
    said = optimizer.metrics()
    used = []
    rows = Rates.rows

    def spy(self, *args):
        used.append(rows(self, *args))
        return used[-1]

    monkeypatch.setattr(Rates, "rows", spy)
    run(optimizer, range(steps + 1, steps + 2))
    used = torch.cat([rates.reshape(-1) for rates in used]).double().numpy()
    # Without the mask only the first array has a rate for each row: it has a spatial factor.
    assert used.size == 8 + (4 + 3 + 10 if optimizer.param_groups[0]["lr_mask_gain"] else 3) + 1
    # float32 rates against float64 ones: a few roundings.
    assert said["rate/mean"] == pytest.approx(used.mean(), rel=1e-6)
    assert (said["rate/min"], said["rate/max"]) == pytest.approx((used.min(), used.max()), rel=1e-6)


def test_the_other_statistics_by_hand():
    optimizer = optimizer_of()
    params = params_of(optimizer)
    assert set(optimizer.metrics()) == {"effective_rank/2", "effective_rank/3", "skipped_steps", "state_bytes"}
    run(optimizer, range(1, 4))
    set_gradients(params, 4)
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    with torch.no_grad():
        params[2].zero_()[0, 0] = 1e-20  # a single direction
        params[3].copy_(torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]] + [[0.0] * 3] * 7))
    found = optimizer.metrics()

    states = [optimizer.state[p] for p in params]
    ell = float(optimizer.param_groups[0]["automagic_log_rate_scale"])
    rows = torch.cat([state["lr_mask"].flatten() for state in states[:-1]])
    factors = [*(ell + rows).exp().tolist(), math.exp(ell)]
    assert found["rate_factor/mean"] == pytest.approx(np.mean(factors), rel=1e-6)
    assert found["rate_factor/max"] == pytest.approx(max(factors), rel=1e-6)
    sizes = [p.numel() for p in params]
    torque = np.average([float(state["torque_mean"]) for state in states], weights=sizes)
    assert found["torque/mean"] == pytest.approx(torque, rel=1e-6)
    assert 0.3 < found["torque/mean"] < 1
    assert found["skipped_steps"] == 1
    assert found["state_bytes"] == optimizer.get_memory_efficiency_report()["state_bytes"]
    assert found["effective_rank/2"] == pytest.approx(1, abs=1e-6)
    p = np.array([3, 2, 1]) / 6
    assert found["effective_rank/3"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert all(isinstance(value, float) for value in found.values())


def energies(**fields):
    only = {"lora_rank_penalty": False, "percentile_clipping": 100, "spatial_scope": "all"}
    optimizer = optimizer_of(((8, 6),), **only, **fields)
    run(optimizer, range(1, 3))
    found = {name: value for name, value in optimizer.metrics().items() if name.startswith("energy_removed/")}
    return found, params_of(optimizer)[0].grad.double()


def test_energy_removed_by_hand():
    found, g = energies(edge_suppression=False)
    f1, f2 = torch.fft.fftfreq(8)[:, None], torch.fft.fftfreq(6)[None, :]
    of_frequency = torch.fft.fft2(g).abs().square()
    high = float(of_frequency[(f1.square() + f2.square()).sqrt() > 0.3].sum() / of_frequency.sum())
    # float32 sums of 48 squares, subtracted from 1.
    assert found == {"energy_removed/suppress_high_frequencies": pytest.approx(high * (1 - 0.95**2), rel=1e-4)}
    found, _ = energies(frequency_penalty=0.0)
    assert list(found) == ["energy_removed/suppress_edges"]
    assert 0 < found["energy_removed/suppress_edges"] < 0.5


def test_names_are_the_parameters_own():
    optimizer = optimizer_of(names=True)
    assert {"effective_rank/layer2.weight", "effective_rank/layer3.weight"} < set(optimizer.metrics())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_in_a_step_and_none_by_itself_in_metrics():
    optimizer = optimizer_of(lr=torch.tensor(1e-3))
    run(optimizer, range(1, 3))
    with Waits() as waits:
        optimizer.step()
        optimizer.metrics()
        assert waits.count == 0
        float(torch.ones(()))
        assert waits.count == 1, "the counter counts"


class Untouchable:
    def metrics(self):
        raise AssertionError("read although nothing was due")


def test_the_logger_writes_lines_and_events(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    optimizer = optimizer_of()
    with MetricsLogger(tmp_path / "run", every=2) as logger:
        for step in range(1, 6):
            run(optimizer, range(step, step + 1))
            loss = torch.tensor(1.0 / step, requires_grad=True) if step != 4 else torch.tensor(torch.inf)
            written = logger.log(step, optimizer, loss=loss)
            assert (written is not None) == (step in (1, 2, 4))
        assert logger.log(7, Untouchable(), loss=torch.ones((), device="meta")) is None
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [line["loss"] for line in lines] == [1.0, 0.5, None]
    events = event_accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(events.Tags()["scalars"]) == set(lines[-1]) - {"step"}
    for tag in ("rate/mean", "skipped_steps", "effective_rank/3", "energy_removed/suppress_edges"):
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        # Event files hold float32.
        assert read == [(line["step"], pytest.approx(line[tag], rel=1e-6)) for line in lines]


def test_what_the_caller_gives_wins_and_none_is_left_out(tmp_path):
    optimizer = optimizer_of()
    run(optimizer, range(1, 2))
    with MetricsLogger(tmp_path, tensorboard=False) as logger:
        record = logger.log(1, optimizer, skipped_steps=7.0, loss=None, accuracy=torch.tensor(0.5))
    assert record == {**optimizer.metrics(), "skipped_steps": 7.0, "accuracy": 0.5}
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, **record}


@pytest.mark.parametrize("many", [torch.ones(2), np.ones(2)])
def test_a_scalar_of_several_numbers_is_named(many):
    for name, words in (("accuracy", "^accuracy"), ("loss", "^a loss")):
        with pytest.raises(ValueError, match=rf"{words} of shape \(2,\) is not one number"):
            MetricsLogger(None).log(1, optimizer_of(), **{"grad_norm": 1.0, name: many})


def test_without_a_folder_the_logger_is_due_alike_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = optimizer_of()
    run(optimizer, range(1, 2))
    with MetricsLogger(tmp_path / "run", every=3) as writer, MetricsLogger(None, every=3) as silent:
        for step in (2, 3, 4, 6):
            assert silent.log(step, optimizer, loss=step) == writer.log(step, optimizer, loss=step), step
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
