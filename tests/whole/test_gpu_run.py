"""``make gpu`` without a GPU: what its runner does with parts that fail or hang, and how wheels are made smaller."""

import argparse
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import shown, wheels
from benchmarks.gpu.__main__ import Run, run_stage
from benchmarks.gpu.parts import STAGES, Part, command, slug


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


def test_every_part_has_a_name_and_a_command_line_of_its_own(tmp_path):
    every = [part for stage in STAGES for part in stage]
    assert len({slug(part.name) for part in every}) == len(every)
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
