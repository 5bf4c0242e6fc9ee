"""``make gpu`` without a GPU: what its runner does with parts that fail or hang, and how wheels are made smaller."""

import argparse
import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.contestants.in_torch import ours
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import jax_speed, measuring, shown, torch_speed, wheels
from benchmarks.gpu.__main__ import Run, run_stage
from benchmarks.gpu.parts import _PYTEST, STAGES, Part, command, slug


def test_a_part_that_fails_or_hangs_changes_nothing_for_the_others(tmp_path):
    program = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'rows': []})); sys.exit(int(sys.argv[2]))"
    (tmp_path / "own_part.py").write_text(program)
    stage = (
        Part("good", ("own_part", "{out}", "0"), 30),
        Part("bad", ("own_part", "{out}", "3"), 30),
        Part("slow", ("timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"), 6),
    )
    run = Run(tmp_path / "out", "cpu")
    options = argparse.Namespace(limit=60, only=None, device="cpu", small=False)
    run_stage(run, stage, options, tmp_path, tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ended = {name: part["ended"] for name, part in results["parts"].items()}
    assert ended == {"good": "exit 0", "bad": "exit 3", "slow": "out of time"}
    assert results["parts"]["bad"]["found"] == {"rows": []}
    assert "- slow: out of time" in shown.table(results)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "log.txt"}


@pytest.mark.parametrize(
    "workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["one process", "workers"]
)
def test_tests_that_are_out_of_time_keep_what_they_found(tmp_path, workers):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as the runner: ignored, it would be by the part too
    file = tmp_path / "test_own.py"
    good, bad = "def test_good(): pass\n", "def test_bad(): assert 1 == 2, 'the message'\n"
    file.write_text(f"import time\n{good}{bad}def test_slow(): time.sleep(60)\n")
    part = Part("tests", (*_PYTEST, *workers, str(file)), 12 if workers else 6)
    run = Run(tmp_path / "out", "cpu")
    options = argparse.Namespace(limit=60, only=None, device="cpu", small=False)
    run_stage(run, (part,), options, tmp_path, tmp_path)
    found = run.results["parts"]["tests"]
    assert found["ended"] == "out of time"
    ((name, message),) = found["tests"].pop("failures").items()
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert name.endswith("test_own.test_bad")  # after folders, where these are below pytest's root
    assert "the message" in message


def test_a_test_that_was_interrupted_in_a_worker_does_not_count(tmp_path):
    (tmp_path / "some.xml").write_text("<testsuite><testcase time='0.1'/><testcase name='a'/></testsuite>")
    assert runner.tests(tmp_path / "some.xml") == {"passed": 1, "failed": 0, "skipped": 0, "failures": {}}


def test_a_process_that_does_not_end_does_not_hold_the_runner():
    class Stuck:
        pid = -1

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("stuck", timeout)

    with mock.patch.object(runner.os, "killpg"):
        runner._end(Stuck())


def test_without_bitsandbytes_no_part_begins_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PathFinder", mock.Mock(find_spec=lambda *_: None))
    line = ["gpu", "--wheels", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match=r"bitsandbytes is missing.*`make gpu-wheels`.*\.whl along"):
        runner.main()
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert [(name, part["ended"]) for name, part in parts.items()] == [("wheels", f"no wheels in {tmp_path / 'none'}")]


def test_states_in_32_bits_do_not_count_as_ours():
    make = ours("balanced", compiled=False, stochastic_rounding=False)
    whole, short = (torch_speed.measure(make, [shape], False, "cpu", 1) for shape in ((256, 256), (8, 8)))
    assert "error" not in whole
    assert short["error"] == "its states are in 32 bits"
    row = {"framework": "torch", "case": "64", "name": "ours", **short}
    assert shown.speeds([row])[-1].endswith("its states are in 32 bits")
    of_32 = torch_speed.measure(ours("balanced", compiled=False, optim_bits=32), [(8, 8)], False, "cpu", 1)
    assert "error" not in of_32


def test_a_slow_program_keeps_no_row_from_the_others(tmp_path, monkeypatch):
    def lowered(entry, grads):
        if "stages" in entry.name:
            raise KeyboardInterrupt  # the end of its time
        return mock.Mock()

    monkeypatch.setattr(jax_speed.Entry, "lowered", lowered)
    monkeypatch.setattr(jax_speed, "measure", lambda *_: {"ms": 1.0})
    monkeypatch.setattr(measuring, "SMALL_CASES", {"64": [(8, 8)]})
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["jax_speed", "--device", "cpu", "--small", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        jax_speed.main()
    rows = json.loads(out.read_text())["rows"]
    assert {row["name"] for row in rows if "ms" in row} >= {"optax.adamw", "ours, balanced", "quantize_state(adamw)"}


def test_every_part_has_a_name_and_a_command_line_of_its_own(tmp_path):
    every = [part for stage in STAGES for part in stage]
    assert len({slug(part.name) for part in every}) == len(every)
    files = [word for part in every for word in part.arguments if word.endswith(".py")]
    assert len(set(files)) == len(files)
    assert sum(max(part.seconds for part in stage) for stage in STAGES[:4]) < 500, "60 s are left for the others"
    assert any(word.endswith("test_codec_exact.py") for part in STAGES[1] for word in part.arguments)
    for part in every:
        for small in (False, True):
            line = command(part, "python", tmp_path, "cuda", small, part.seconds)
            assert line[:2] == ["python", "-m"]
            assert not any("{" in word for word in line)
            for word in line:
                assert not word.startswith("tests/") or (Path(__file__).parents[2] / word).exists()


def test_a_wheel_without_some_files_can_still_be_installed(tmp_path):
    files = {"some/__init__.py": b"x = 1\n", "some/lib_a.so": b"a" * 999, "some/lib_b.so": b"b"}
    about = {"some-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: some\nVersion: 1.0\n"}
    about["some-1.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    wheel = tmp_path / "wheels" / "some-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in {**files, **about, "some-1.0.dist-info/RECORD": b""}.items():
            archive.writestr(name, data)
    wheels.without(wheel, re.compile(r"some/lib_(?!b\.)\w+\.so"))
    with zipfile.ZipFile(wheel) as archive:
        record = archive.read("some-1.0.dist-info/RECORD").decode()
        assert "some/lib_a.so" not in archive.namelist()
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"b").digest()).rstrip(b"=").decode()
    assert f"some/lib_b.so,sha256={digest},1" in record.splitlines()
    assert wheels.install(wheel.parent, tmp_path / "site") == ""
    assert (tmp_path / "site" / "some" / "lib_b.so").read_bytes() == b"b"


@pytest.mark.slow  # each imports torch in a process of its own
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_plugin_moves_what_tests_make(device):
    program = """
import torch
from benchmarks.gpu import on_cuda
on_cuda.pytest_configure()
drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
assert drawn.device.type == torch.zeros(2).device.type == on_cuda.DEVICE
assert torch.zeros(2, device="cpu").device.type == "cpu"
assert torch.nn.Parameter(drawn).requires_grad
if on_cuda.DEVICE == "cpu":
    print(drawn.numpy().tolist())
"""
    environment = {**os.environ, "TEST_DEVICE": device}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    if device == "cpu":
        expected = torch.randn(3, generator=torch.Generator().manual_seed(0)).tolist()
        assert json.loads(done.stdout) == expected
