"""`make dist-check`: wheel and sdist, what is in them, and whether they install and work with each extra.

Each is installed into an empty environment, once without extras and once with each extra of pyproject.toml, in the
versions of constraints.txt.  There `first_steps.py` runs in an empty folder.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path
from typing import Any

from packaging.metadata import Metadata
from packaging.requirements import Requirement

from release.environments import FIRST_STEPS, ROOT, ReleaseError, empty_environment, install, run

PACKAGES = ("automagic_core", "automagic_torch", "automagic_optax", "automagic_cameamp_improved_8bit")
BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
"""What an sdist holds beside the packages; setuptools adds PKG-INFO, setup.cfg and a folder `.egg-info`."""

_TYPED = {f"{package}/py.typed" for package in PACKAGES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.dist_check", description="builds, reads and installs")
    parser.add_argument("--only", nargs="*", help="extras to install instead of all; 'none' is without")
    wanted = parser.parse_args().only
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ["none", *project["optional-dependencies"]]
    if unknown := set(wanted or ()) - set(extras):
        parser.error(f"no extra is called {', '.join(sorted(unknown))}; there are {', '.join(extras)}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel, sdist = built(Path(folder))
            check_contents(wheel, sdist, project)
            for extra in wanted or extras:
                for archive in (wheel, sdist):
                    check_installed(archive, extra, project, Path(folder))
    except ReleaseError as told:
        sys.exit(f"dist-check: {told}")
    print("All of it holds.")


def built(folder: Path, *options: str, source: Path = ROOT) -> tuple[Path, Path]:
    """(wheel, sdist) in folder/dist; the wheel is built from the unpacked sdist."""
    print("building the sdist, and from it the wheel", flush=True)
    run("the build", [sys.executable, "-m", "build", *options, "--outdir", folder / "dist", source], folder)
    (wheel,), (sdist,) = (sorted((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path, project: dict[str, Any]) -> None:
    """Both hold every file of the packages and the licence, and nothing else; their metadata are those of the project.

    Raises:
        ReleaseError: with the file or field.
    """
    print("reading both", flush=True)
    ours = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    _same(ROOT, ours & _TYPED, _TYPED)
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        info = f"{wheel.name.rsplit('-', 3)[0]}.dist-info"
        _same(wheel, {name for name in names if not name.startswith(f"{info}/")}, ours)
        _same(wheel, names & {f"{info}/licenses/LICENSE"}, {f"{info}/licenses/LICENSE"})
        _check_metadata(wheel, opened.read(f"{info}/METADATA"), project)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2]: name for name in archive.getnames() if archive.getmember(name).isfile()}
        _same(sdist, {name for name in inside if ".egg-info/" not in name}, ours | BESIDE)
        read = archive.extractfile(inside["PKG-INFO"])
        assert read is not None
        _check_metadata(sdist, read.read(), project)


def _same(archive: Path, held: set[str], due: set[str]) -> None:
    for what, names in (("lacks", due - held), ("holds and should not", held - due)):
        if names:
            raise ReleaseError(f"{archive.name} {what}: {', '.join(sorted(names)[:10])}")


def _check_metadata(archive: Path, text: bytes, project: dict[str, Any]) -> None:
    try:
        metadata = Metadata.from_email(text, validate=True)
    except ExceptionGroup as faults:
        raise ReleaseError(f"the metadata of {archive.name} are not valid: {faults.exceptions}") from faults
    told = {
        "version": (str(metadata.version), project["version"]),
        "licence": (metadata.license_expression, project["license"]),
        "version of Python": (str(metadata.requires_python), project["requires-python"]),
        "list of classifiers": (metadata.classifiers, project["classifiers"]),
        "list of extras": (set(metadata.provides_extra or ()), set(project["optional-dependencies"])),
        "README": (metadata.description, (ROOT / project["readme"]).read_text()),
    }
    for field, (found, due) in told.items():
        if found != due:
            raise ReleaseError(
                f"the {field} of {archive.name} is {found!s:.200}, not {due!s:.200} as in pyproject.toml"
            )


def check_installed(archive: Path, extra: str, project: dict[str, Any], folder: Path) -> None:
    """An archive with an extra installs into an empty environment, and each framework of the extra takes a step.

    Raises:
        ReleaseError: with what failed.
    """
    start = time.monotonic()
    name = f"{archive.name}[{extra}]" if extra != "none" else archive.name
    print(f"installing {name}", end=" ", flush=True)
    python = empty_environment(folder / "environment", Path(sys.executable))
    install(python, [f"{archive}[{extra}]" if extra != "none" else str(archive)])
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    version, *steps = (
        run(f"the first steps with {name}", [python, "-I", FIRST_STEPS], empty).splitlines()[-1].split()[1:]
    )
    if version != project["version"]:
        raise ReleaseError(f"{name} says that it is version {version}, not {project['version']}")
    if missing := frameworks(extra, project) - set(steps):
        raise ReleaseError(f"{name} brings no {', '.join(sorted(missing))}")
    print(f"({time.monotonic() - start:.0f} s): steps of {' and '.join(steps) or 'no framework'}", flush=True)


def frameworks(extra: str, project: dict[str, Any]) -> set[str]:
    """Which of torch and jax an extra names, itself or by another extra."""
    named: set[str] = set()
    for requirement in map(Requirement, project["optional-dependencies"].get(extra, ())):
        named |= {requirement.name} & {"torch", "jax"}
        if requirement.name == project["name"]:
            named.update(*(frameworks(inner, project) for inner in requirement.extras))
    return named


if __name__ == "__main__":
    main()
