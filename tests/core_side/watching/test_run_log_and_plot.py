"""A run's log as it is written and read, and the page drawn from it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from automagic_core.plot import main, plot
from automagic_core.watching.metrics import ArrayFacts, NextStep, effective_ranks, metrics
from automagic_core.watching.plot_names import short_names
from automagic_core.watching.plot_page import PANELS, _Style
from automagic_core.watching.run_log import RunLog, read_run


def array(**facts) -> ArrayFacts:
    plain = ArrayFacts(6, 0.0, None, None, 1.0, 0, NextStep(1e-3, 5, 4, 1e-7, 1e-2))
    return plain._replace(**facts)


def test_rates_by_hand() -> None:
    delta, variance = np.log([[1.0], [2.0], [4.0]]), np.array([[1.0], [4.0], [64.0]])
    kappa = [2.0, 2.0, math.sqrt(23 / 64)]  # √(mean / variance), at most 2
    one = array(log_rate_scale=math.log(3), lr_mask=delta, spatial_variance=variance)
    found = metrics([one], {}, {}, 0)
    rates = [3e-3 * factor * k for factor, k in zip((1, 2, 4), kappa, strict=True)]
    rates[1] = min(rates[1], 1e-2)  # the limit
    assert found["rate/mean"] == pytest.approx(np.mean(rates), rel=1e-5)
    assert (found["rate/min"], found["rate/max"]) == pytest.approx((min(rates), max(rates)), rel=1e-5)
    assert found["rate_factor/max"] == pytest.approx(12)
    rounding = metrics([array(spatial_variance=1e-15 * variance)], {}, {}, 0)
    assert rounding["rate/min"] == rounding["rate/max"]
    # The rate that was asked for is neither lifted to min_lr nor lowered to max_lr; a rate of 0 stays 0.
    for at, rate in (
        (NextStep(2e-7, 1, 4, 1e-7, 1e-2), 0.5e-7),
        (NextStep(0.0, 9, 4, 1e-7, 1e-2), 0.0),
        (NextStep(1e-9, 9, 4, 1e-7, 1e-2), 1e-9),
        (NextStep(1.0, 9, 4, 1e-7, 1e-2), 1.0),
        (NextStep(1e-3, 1, 0, 1e-7, 1e-2), 1e-3),
    ):
        assert metrics([array(next_step=at)], {}, {}, 0)["rate/mean"] == pytest.approx(rate)


def test_torque_counts_elements_and_leaves_out_arrays_without_one() -> None:
    arrays = [array(size=30, torque_mean=0.4), array(size=10, torque_mean=0.8), array(size=99, skipped_steps=2)]
    found = metrics(arrays, {"suppress_edges": 0.25}, {"a": 3.5}, 12)
    assert found["torque/mean"] == pytest.approx(0.5)
    assert (found["skipped_steps"], found["state_bytes"]) == (2, 12)
    assert (found["energy_removed/suppress_edges"], found["effective_rank/a"]) == (0.25, 3.5)
    assert "torque/mean" not in metrics(arrays[2:], {}, {}, 0)


def test_effective_ranks() -> None:
    W = np.stack([np.eye(3, 5), np.diag([5.0, 0, 0]) @ np.eye(3, 5), np.zeros((3, 5)), np.full((3, 5), np.nan)])
    assert effective_ranks(W @ W.swapaxes(1, 2)) == pytest.approx([3, 1, 0, 0])


def test_a_run_that_was_killed_and_went_on(tmp_path: Path) -> None:
    with RunLog(tmp_path, every=1, tensorboard=False) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": step, "old": 1.0})
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "lo')
    assert read_run(tmp_path)["loss"] == ([1, 2, 3, 4], [1, 2, 3, 4])
    # Steps 3 and on are taken again, from the checkpoint of step 2.
    with RunLog(tmp_path, every=1, tensorboard=False) as log:
        log.write(3, {"loss": math.inf})
    curves = read_run(file)
    assert curves["loss"][0] == [1, 2, 3]
    assert curves["loss"][1][:2] == [1, 2]
    assert math.isnan(curves["loss"][1][2])
    assert curves["old"] == ([1, 2], [1, 1])
    file.write_text("1.5\n" + file.read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is no record of a step: '1.5'"):
        read_run(tmp_path)


def test_names_of_runs() -> None:
    assert short_names(["/a/x/one", "/a/y/one", "/a/x/two"]) == ["x/one", "y/one", "two"]
    assert short_names(["/a/one", "/a/one"]) == ["one (1)", "one (2)"]
    (name,) = short_names(["/a/" + "b" * 100 + "_seed0"])
    assert len(name) == 40
    assert name.endswith("_seed0")
    assert len(set(short_names([f"/a/{'b' * 50}{i}{'b' * 50}" for i in range(3)]))) == 3


RATES = ("rate", "rate_factor")
SPREAD = {"mean": 1e-3, "min": 5e-4, "max": 2e-3}


def write_run(path: Path, steps: int, keys: str = "all") -> Path:
    with RunLog(path, every=1, tensorboard=False) as log:
        for step in range(1, steps + 1):
            record = {"loss": 1 / step, "skipped_steps": 0.0}
            if keys == "all":
                record |= {f"{name}/{how}": scale * step for name in RATES for how, scale in SPREAD.items()}
                record |= {"torque/mean": 0.5, "energy_removed/suppress_edges": 0.1, "state_bytes": 1e6}
                record |= {f"effective_rank/layer{i}.lora_a": 2.0 + i for i in range(3)}
            log.write(step, record)
    return path


def drawn(path: Path) -> np.ndarray:
    """Whether a pixel is not white, after checks that it is a page."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[:2] == (1500, 1200)
    return (pixels[..., :3] < 0.98).any(axis=-1)


def test_the_command_draws_one_page(tmp_path: Path) -> None:
    full, bare = write_run(tmp_path / "full", 20), write_run(tmp_path / "bare", 20, "few")
    point = write_run(tmp_path / "point", 1)
    command = [sys.executable, "-m", "automagic_core.plot", str(full)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(full / "metrics.png")
    ink = drawn(full / "metrics.png")
    rows = ink.reshape(4, 375, 2, 600).any(axis=(1, 3))
    assert rows.all(), "a panel is empty"
    page = plot([full, bare / "metrics.jsonl", point], tmp_path / "new" / "several.png")
    assert (drawn(page) != ink).any()
    # A panel without data says so and has no curve.
    assert drawn(plot([bare])).sum() < 0.7 * ink.sum()
    assert drawn(plot([point])).any()


def test_a_rate_that_ends_at_zero_has_no_band_there() -> None:
    from matplotlib.figure import Figure

    axes, steps = Figure().add_subplot(), [1, 2, 3]
    curves = {f"rate/{how}": (steps, [scale, scale, 0.0]) for how, scale in SPREAD.items()}
    assert PANELS["Row rates: mean and range"](axes, curves, _Style(0, 1))
    (band,) = axes.collections
    assert {x for path in band.get_paths() for x in path.vertices[:, 0]} == {1.0, 2.0}


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys, monkeypatch) -> None:
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    log = tmp_path / "metrics.jsonl"
    for written, message in ((b"", f"nothing to draw yet in {tmp_path}"), (b"\xff\n", f"{log} is no log of a run")):
        log.write_bytes(written)
        assert main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    run = write_run(tmp_path / "run", 2)
    for out in (tmp_path / "folder.png", run / "metrics.jsonl/page.png"):
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        assert main([str(run), "--out", str(out)]) == 2
        assert str(tmp_path) in capsys.readouterr().err
    assert main([str(run), "--out", str(tmp_path / "page.pdf")]) == 2
    assert "a name that ends in .png" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(run)]) == 2
    assert "pip install 'automagic-cameamp[dashboards]'" in capsys.readouterr().err


def test_a_step_may_be_an_array_of_one_number(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 1, tensorboard=False)
    for step in (np.int64(1), np.array(2)):
        log.write(step, {"loss": 1.0})
    assert read_run(tmp_path) == {"loss": ([1, 2], [1.0, 1.0])}
