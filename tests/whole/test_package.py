"""The wheel: it builds, carries the four packages with py.typed, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("automagic_core", "automagic_torch", "automagic_optax", "automagic_cameamp_improved_8bit")


def test_the_wheel_builds_and_carries_py_typed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation: the build's own needs are already installed, and a test should not download.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert packages == set(PACKAGES)
    for package in packages:
        assert f"{package}/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_no_framework_imports_the_other():
    for package, foreign in (("automagic_core", ("torch", "jax", "optax")), ("automagic_torch", ("jax", "optax"))):
        for path in (ROOT / package).glob("**/*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].split(".")[0] not in foreign, f"{path}: {line}"
    forbidden = {"automagic_core": ("automagic_torch", "automagic_optax", "parity")}
    forbidden["automagic_torch"] = ("automagic_optax", "parity")
    forbidden["automagic_optax"] = ("automagic_torch", "parity")
    for package, others in forbidden.items():
        for path in (ROOT / package).glob("**/*.py"):
            imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
            assert not [line for line in imports for other in others if other in line], path
