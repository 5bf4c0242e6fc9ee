"""Empty virtual environments, what is installed into them, and what runs in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
FIRST_STEPS = Path(__file__).with_name("first_steps.py")


class ReleaseError(Exception):
    """One sentence that says what a release does not do."""


def run(what: str, command: Sequence[str | Path], cwd: Path) -> str:
    """What a command prints.  It sees nothing of this repository but what it names.

    Raises:
        ReleaseError: it ended with another status than 0; the message has `what` and its last lines.
    """
    foreign = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    ran = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if ran.returncode:
        last = "\n".join(f"    {line}" for line in ran.stdout.splitlines()[-20:])
        raise ReleaseError(f"{what} failed:\n{last}")
    return ran.stdout


def python_of(version: str) -> Path | None:
    """The interpreter of a version as "3.12", or None where there is none."""
    if sys.version.startswith(f"{version}."):
        return Path(sys.executable)
    found = shutil.which(f"python{version}")
    # A version manager may have the name and nothing behind it.
    works = found and not subprocess.run([found, "-c", ""], capture_output=True).returncode
    return Path(found) if found and works else None


def empty_environment(folder: Path, python: Path) -> Path:
    """The interpreter of a new virtual environment with nothing but pip in it."""
    run(f"making {folder}", [python, "-m", "venv", "--clear", folder], folder.parent)
    return folder / "bin" / "python"


def install(python: Path, wanted: Sequence[str], constraints: Path = CONSTRAINTS) -> None:
    """Installs into an environment, in the versions of a file, and lets pip check that all fits."""
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # Compiling all of torch to bytecode takes longer than what is then run.
    options: list[str | Path] = ["install", "--no-compile", "--constraint", constraints]
    run(f"installing {' '.join(wanted)}", [*pip, *options, *wanted], python.parent)
    run("`pip check`", [*pip, "check"], python.parent)


def versions_of(python: Path) -> dict[str, str]:
    """Every distribution in an environment with its version, and `python`."""
    ask = (
        "import importlib.metadata as m, json, platform\n"
        "found = {d.name.lower(): d.version for d in m.distributions()}\n"
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    found: dict[str, str] = json.loads(run("asking for versions", [python, "-I", "-c", ask], python.parent))
    return found
