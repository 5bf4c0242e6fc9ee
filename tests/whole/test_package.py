"""Wheel and sdist: they build, hold the four packages, their types and the licence, and nothing else."""

import re
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest

from release.dist_check import PACKAGES, built, check_contents, frameworks
from release.environments import ReleaseError

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # A folder of tests beside them, as here: setuptools would take some of it by itself.
    (source / "tests").mkdir()
    (source / "tests" / "test_none.py").touch()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # Without isolation: the build's own needs are already installed, and a test should not download.
    return built(folder, "--no-isolation", source=source)


def test_they_hold_what_they_should(archives):
    check_contents(*archives, PROJECT)


FAULTS = {
    "lacks: automagic_core/py.typed": lambda name, text: None if name == "automagic_core/py.typed" else text,
    "lacks: automagic_torch/stages/chain.py": lambda name, text: None if name.endswith("stages/chain.py") else text,
    "lacks: automagic_cameamp-VERSION.dist-info/licenses/LICENSE": lambda name, text: (
        None if name.endswith("/LICENSE") else text
    ),
    "whl is 0.0.1, not VERSION": lambda name, text: re.sub(rb"\nVersion: .*", b"\nVersion: 0.0.1", text),
    "the list of extras": lambda name, text: text.replace(b"Provides-Extra: jax\n", b""),
    "are not valid": lambda name, text: text.replace(b"\nRequires-Python: >=", b"\nRequires-Python: at least "),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_in_a_wheel_is_named(archives, message, tmp_path):
    wheel, sdist = archives
    faulty = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as good, zipfile.ZipFile(faulty, "w") as bad:
        for name in good.namelist():
            if (text := FAULTS[message](name, good.read(name))) is not None:
                bad.writestr(name, text)
    with pytest.raises(ReleaseError, match=re.escape(message.replace("VERSION", PROJECT["version"]))):
        check_contents(faulty, sdist, PROJECT)


def test_a_file_too_many_is_named(archives, tmp_path):
    wheel, sdist = archives
    faulty = Path(shutil.copy(wheel, tmp_path))
    with zipfile.ZipFile(faulty, "a") as bad:
        bad.writestr("tests/test_none.py", "")
    with pytest.raises(ReleaseError, match=r"holds and should not: tests/test_none\.py"):
        check_contents(faulty, sdist, PROJECT)


def test_which_frameworks_an_extra_brings():
    brought = {extra: frameworks(extra, PROJECT) for extra in PROJECT["optional-dependencies"]}
    assert brought["torch"] == {"torch"}
    assert brought["jax"] == {"jax"}
    assert brought["files"] == set()
    assert brought["all"] == brought["dev"] == {"torch", "jax"}


def test_one_version_everywhere():
    version = PROJECT["version"]
    cited = re.search(r"^version: (.+)\ndate-released: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\d.*) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited.groups() == newest.groups()
    assert cited[1] == version


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
