"""The parity report: its suites keep their bounds, and an exceeded bound is an exit code of 1."""

import json

import numpy as np
import pytest

from automagic_optax.codec.quantized_array import exact_rule
from parity import __main__ as command
from parity import carried_runs, codec_suite, free_running, model_runs
from parity.checks import Check, Report, distance

pytestmark = pytest.mark.compiled_quickly


def test_the_codec_is_that_of_bitsandbytes():
    checks = list(codec_suite.suite("cpu", size=300_000))
    assert len(checks) > 20
    assert [check.name for check in checks if not check.passed] == []


def test_the_codec_suite_notices_another_rule(monkeypatch):
    # The exact rule beside bitsandbytes' CPU grid: differs near midpoints, so the suite must fail.
    monkeypatch.setattr(codec_suite, "rounding_rule", lambda device: exact_rule)
    failed = {check.name for check in codec_suite.suite("cpu", size=300_000) if not check.passed}
    assert any("off the grid rule" in name for name in failed)


@pytest.mark.slow  # `make parity` has it, with more steps
def test_free_running_sides_stay_as_near_as_two_torch_runs():
    checks = list(free_running.suite("cpu", marks=(1, 10, 60)))
    assert [check.name for check in checks if not check.passed] == []


@pytest.mark.slow
def test_free_running_notices_a_missing_feature(monkeypatch):
    real = free_running.JaxSide
    monkeypatch.setattr(free_running, "JaxSide", lambda fields, *rest: real({**fields, "torque": False}, *rest))
    assert not all(check.passed for check in free_running.suite("cpu", marks=(1, 10)))


@pytest.mark.slow
def test_a_model_trains_the_same_in_both_frameworks():
    checks = list(model_runs.suite("cpu"))
    assert [(check.name, check.value) for check in checks if not check.passed] == []


@pytest.mark.slow
def test_a_run_goes_on_in_the_other_framework_and_layout():
    checks = list(carried_runs.suite("cpu"))
    assert [(check.name, check.value) for check in checks if not check.passed] == []


@pytest.mark.slow
def test_carried_runs_notice_a_state_that_begins_anew(monkeypatch):
    monkeypatch.setattr(carried_runs, "from_torch_state", lambda *_, **__: None)
    real = carried_runs.FlaxRun.__setattr__

    def keeps_its_first_state(self, name, value):
        if value is not None:
            real(self, name, value)

    monkeypatch.setattr(carried_runs.FlaxRun, "__setattr__", keeps_its_first_state)
    checks = {check.name: check for check in carried_runs.suite("cpu", half=60)}
    noticed = [name for name, check in checks.items() if "torch, then jax" in name and not check.passed]
    assert len(noticed) == 4


def test_an_exceeded_bound_is_an_exit_code(tmp_path, monkeypatch):
    fine, exceeded = Check("S", "fine", 1.0, 2.0), Check("S", "bad", 3.0, 2.0)
    for checks, code in (([fine], 0), ([fine, exceeded], 1), ([Check("S", "nan", float("nan"), 1.0)], 1), ([], 1)):
        monkeypatch.setitem(command.SUITES, "codec", lambda device, checks=checks: checks)
        assert command.main(["--only", "codec", "--out", str(tmp_path)]) == code
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["passed"] is (code == 0)
        assert len(report["checks"]) == len(checks)
    assert "# Parity report" in (tmp_path / "report.md").read_text()


def test_bounds_and_distances():
    assert Check("S", "n", 0.9, 0.8, at_least=True).passed
    assert not Check("S", "n", 0.7, 0.8, at_least=True).passed
    assert "EXCEEDED" in Report({}, [Check("S", "n", 3.0, 2.0)]).markdown()
    assert distance(np.ones(4), np.ones(4) * 2) == 0.5
    assert distance(np.ones(4), np.zeros(4)) == 2.0
    assert distance(np.ones(4) * 1e-3, np.zeros(4), floor=1.0) == pytest.approx(1e-3)
