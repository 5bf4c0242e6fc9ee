"""`make soak` in small: each part works, and each notices what it is for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from automagic_torch import AutomagicCameAMP8bit
from benchmarks.soak import endurance, fuzz, large
from benchmarks.soak.__main__ import main
from benchmarks.soak.fuzz_cases import ArrayCase, Case
from benchmarks.soak.fuzz_judge import Tally, check_case
from benchmarks.soak.fuzz_torch import CompiledRunner, TorchRunner
from benchmarks.soak.kills import kill_again_and_again
from benchmarks.soak.kills_torch import NAME, TorchTraining
from benchmarks.soak.memory import Sample, drift
from benchmarks.soak.report import write_report
from benchmarks.soak.tasks import TASKS
from tests.torch_side.torch_helpers import TOO_OLD_TO_COMPILE

MIB = 2**20


class Forgetful(TorchTraining):
    """Goes on without the state of one array."""

    def restore(self, folder: Path) -> int:
        step = super().restore(folder)
        if step:
            self.optimizer.state[self.model[0].weight]["exp_avg_sq_row_absmax"] *= 1.001
        return step


class Careless(TorchTraining):
    """Writes into the file that counts, and not all of it."""

    def save(self, folder: Path, step: int) -> None:
        super().save(folder, step)
        if step >= 2:
            whole = (folder / NAME).read_bytes()
            (folder / NAME).write_bytes(whole[: len(whole) // 2])


def samples(growth: int) -> list[Sample]:
    """Of a process of 100 MiB in a run of 800 steps that keeps some bytes of every step."""
    return [Sample(t, 400 * MIB + growth * t, 100 * MIB + growth * t, 50_000) for t in range(10, 801, 10)]


class TestEndurance:
    def test_memory_that_grows_is_noticed(self) -> None:
        assert drift(samples(0), 800).flat
        # 1 % of 100 MiB over the 600 steps between the medians is 1.7 kB a step.
        assert drift(samples(1500), 800).flat
        leaking = drift(samples(2000), 800)
        assert not leaking.flat
        assert leaking.own_bytes_per_step == pytest.approx(2000)

    @pytest.mark.slow
    def test_a_short_run(self) -> None:
        from benchmarks.soak.endurance_torch import run

        record = run(120, 8)
        # Other tests have left garbage in this process, so its memory may move; nothing else may be wrong.
        assert [text for text in record["failures"] if not text.startswith("memory grew")] == []
        assert record["8bit_parameters"] == endurance.WIDTH**2
        assert record["samples"] == 12

    def test_a_loss_that_is_not_finite_is_noticed(self) -> None:
        run = endurance.Trained(lambda t: np.nan if t == 33 else 1 / t, lambda: True, lambda: 40)
        assert endurance.endure(run, 40)["failures"] == ["1 losses are not finite"]

    @pytest.mark.slow  # a minute of compiling
    @pytest.mark.parametrize("bits", [8, 32])
    def test_a_short_run_in_jax(self, bits: int) -> None:
        from benchmarks.soak.endurance_jax import run

        record = run(120, bits)
        assert [text for text in record["failures"] if not text.startswith("memory grew")] == []
        assert record["8bit_parameters"] == (endurance.WIDTH**2 if bits == 8 else 0)


class TestKills:
    @staticmethod
    def kill(make: Any, tmp_path: Path, kills: int = 2) -> dict[str, Any]:
        return kill_again_and_again(make, tmp_path / "run", kills, preload="benchmarks.soak.kills_torch", steps=25)

    @pytest.mark.slow  # `make soak` kills more runs, and tests of checkpoints go on bit for bit
    def test_restarts_go_on_bit_for_bit(self, tmp_path: Path) -> None:
        record = self.kill(TorchTraining, tmp_path)
        assert record["failures"] == []
        assert record["kills"] == sum(record["phases"].values()) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(("make", "reason"), [(Forgetful, "other bits"), (Careless, "failed")])
    def test_what_goes_wrong_is_noticed(self, make: Any, reason: str, tmp_path: Path) -> None:
        (failure,) = self.kill(make, tmp_path, 8)["failures"]
        assert reason in failure

    @pytest.mark.slow
    def test_orbax(self, tmp_path: Path) -> None:
        from benchmarks.soak.kills_jax import maker

        make = maker(tmp_path / "compiled")
        record = kill_again_and_again(make, tmp_path / "run", 2, preload="benchmarks.soak.kills_jax", steps=15)
        assert record["failures"] == []


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.parametrize(("warmup_steps", "dtype"), [(2**31 - 2, "bfloat16"), (3, "float16")])
def test_the_end_of_the_step_counter(warmup_steps: int, dtype: str) -> None:
    from benchmarks.soak.counters import run

    record = run(warmup_steps, dtype)
    assert record["failures"] == []
    assert record["codes"] > 10_000


def test_codes_of_another_step_are_noticed() -> None:
    from benchmarks.soak.counters import _bit_failures, _written

    p = torch.nn.Parameter(torch.ones(24, 20))
    fields: dict[str, Any] = {"force_8bit": True, "min_8bit_size": 1, "block_wise": False, "factored": "none"}
    optimizer = AutomagicCameAMP8bit([p], **fields)
    rng = np.random.default_rng(0)
    for _ in range(3):
        p.grad = torch.tensor(rng.standard_normal((24, 20)), dtype=torch.float32)
        with _written() as written:
            optimizer.step()
    counted = {"codes": 0}
    assert list(_bit_failures(written, 3, counted)) == []
    assert counted["codes"] == 3 * 480
    assert list(_bit_failures(written, 2, counted)) != []


class TestFuzz:
    CASE = Case(
        {"lr": 1e-3, "optim_bits": 32, "spatial_awareness": False},
        "torch",
        (ArrayCase((6, 5), "float32", False, False, 1.0),),
        (),
        1,
    )

    def test_random_runs_in_torch(self) -> None:
        record = fuzz.fuzz_torch(60, 0)
        assert record["failures"] == []
        # What hypothesis draws depends on the modules that are loaded too: so few cases may all be of one kind.
        assert record["counts"]["cases"] >= 60
        assert record["counts"]["invalid configurations"] >= 60

    def test_what_is_counted(self) -> None:
        tally = Tally()
        for kind in ("normal", "one nan"):
            check_case(self._with(kind), TorchRunner(self._with(kind)), tally)
        assert (tally.counts["compared with the oracle"], tally.counts["skipped"]) == (1, 1)
        assert tally.largest_distance > 0

    @pytest.mark.skipif(TOO_OLD_TO_COMPILE, reason="the step is eager before torch 2.9")
    def test_a_compiled_step_that_differs_from_the_eager_one_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = self._with("normal")
        runner = CompiledRunner(case)
        check_case(case, runner, Tally())
        step = runner.eager.step

        def spoilt(gradients: list[Any]) -> Any:
            updates = step(gradients)
            runner.eager.params[0].data.mul_(1.01)
            return updates

        monkeypatch.setattr(runner.eager, "step", spoilt)
        with pytest.raises(AssertionError, match="array 0: the compiled step is"):
            runner.step(case.gradients(1))

    @pytest.mark.slow
    @pytest.mark.parametrize("x64", [False, True])
    def test_random_runs_in_jax(self, x64: bool) -> None:
        import jax

        try:
            assert fuzz.fuzz_jax(15, 0, x64)["failures"] == []
        finally:
            jax.config.update("jax_enable_x64", False)

    @pytest.mark.parametrize(
        ("kind", "change", "message"),
        [
            ("normal", lambda p: p.data.add_(2.0), "further than the rate"),
            ("normal", lambda p: p.data.fill_(torch.nan), "not finite"),
            ("one nan", lambda p: p.data.mul_(1 + 1e-6), "moved"),
            ("absent", lambda p: p.data.mul_(1 + 1e-6), "moved"),
        ],
    )
    def test_a_step_that_is_wrong_is_noticed(self, kind: str, change: Any, message: str) -> None:
        runner = TorchRunner(self._with(kind))
        step = runner.step

        def spoilt(gradients: list[Any]) -> Any:
            updates = step(gradients)
            change(runner.params[0])
            return updates

        runner.step = spoilt  # type: ignore[method-assign]
        with pytest.raises(AssertionError, match=message):
            check_case(self._with(kind), runner, Tally())

    def test_an_update_that_is_not_the_oracles_is_noticed(self) -> None:
        case = self._with("normal")
        runner = TorchRunner(case)
        runner.optimizer.param_groups[0]["automagic_confidence_floor"] = 0.011
        with pytest.raises(AssertionError, match="oracle"):
            check_case(case, runner, Tally())

    def _with(self, kind: str) -> Case:
        return Case(self.CASE.fields, self.CASE.layout, self.CASE.arrays, ((kind,),), 1)

    @pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
    def test_the_rounding_of_a_long_array(self, framework: str) -> None:
        # Long enough for the share that moves: 6 standard deviations of 2¹⁹ draws are 0.4 %, so only the bits count.
        record = large.run(framework, 2**19 + 5)
        assert [text for text in record["failures"] if "moved instead" not in text] == []


class TestCommand:
    def test_a_task_is_done_until_it_passes(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        paths = ["--folder", str(tmp_path / "records"), "--docs", str(tmp_path / "reliability.md")]

        def soak(**record: Any) -> tuple[int, str]:
            work = functools.partial(dict, seconds=1.0, **record)
            monkeypatch.setitem(TASKS, "large-torch", TASKS["large-torch"]._replace(work=work))
            return main(["--tasks", "large-torch", *paths]), capsys.readouterr().out

        status, said = soak(failures=["it broke"])
        assert status == 1
        assert "it broke" in said
        assert "- large-torch: it broke" in (tmp_path / "reliability.md").read_text()
        status, said = soak(failures=[], size=77, compared=5)
        assert status == 0
        assert "passed" in said
        assert "an array of 77" in (tmp_path / "reliability.md").read_text()
        # It has passed: it is not done again.
        status, said = soak(failures=["it would break"])
        assert status == 0
        assert "would" not in said
        with pytest.raises(SystemExit):
            main(["--parts", "kill", *paths])
        assert "unknown kill; valid: counters, fuzz, kills, endurance" in capsys.readouterr().err

    def test_a_report_of_nothing(self, tmp_path: Path) -> None:
        write_report({}, tmp_path / "reliability.md")
        assert "Nothing has run yet." in (tmp_path / "reliability.md").read_text()
