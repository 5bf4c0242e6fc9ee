"""Optimizers to compare with, as wheels for a machine without network: ``python -m benchmarks.gpu.wheels .whl``

They are fetched where there is a network, taken along in .whl, which git ignores, and installed beside the libraries of
the other machine, without what they depend on.  Of bitsandbytes' libraries, one for each version of CUDA, only those
for CUDA 13 and for the CPU are kept.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = (
    "bitsandbytes==0.50.2",
    "torchao==0.18.0",
    "flashoptim==0.1.4",
    "flashoptim-jax==0.1.0",
    "came-pytorch==0.1.3",
    "prodigyopt==1.1.2",
)
LIMIT = 60 * 2**20
"""Bytes of all wheels together."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_DROPPED = {
    "bitsandbytes": re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu\.|cuda13)\w+\.so"),
    "torchao": re.compile(r"test/.*"),
}


def fetch(folder: Path, python: str = "3.12") -> list[Path]:
    """Downloads the wheels for Linux on x86-64 and takes out of them what is not needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += [f"--python-version={python}", "--implementation=cp", f"--dest={folder}", *WHEELS]
    subprocess.run(command, check=True)
    for name, dropped in _DROPPED.items():
        for wheel in folder.glob(f"{name}-*.whl"):
            without(wheel, dropped)
    wheels = sorted(folder.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    if total > LIMIT:
        raise SystemExit(f"the wheels have {total:,} bytes; at most {LIMIT:,} are allowed")
    return wheels


def without(wheel: Path, dropped: re.Pattern[str]) -> None:
    """Rewrites a wheel without the files whose whole name matches; its RECORD lists what is left."""
    kept: dict[str, bytes] = {}
    with zipfile.ZipFile(wheel) as archive:
        for item in archive.infolist():
            if not item.is_dir() and not dropped.fullmatch(item.filename):
                kept[item.filename] = archive.read(item)
    (record,) = (name for name in kept if name.endswith(".dist-info/RECORD"))
    lines = [f"{name},{_digest(data)},{len(data)}" for name, data in kept.items() if name != record]
    kept[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    smaller = wheel.with_suffix(".part")
    with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in kept.items():
            archive.writestr(name, data)
    smaller.replace(wheel)


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def install(folder: Path, target: Path) -> str:
    """Installs the wheels of a folder into another one, one by one and without network; returns what went wrong."""
    wheels = sorted(folder.glob("*.whl"))
    errors = [] if wheels else [f"no wheels in {folder}"]
    for wheel in wheels:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", f"--target={target}", str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors.append(f"{wheel.name}: {done.stderr.strip()[-500:]}")
    return "\n".join(errors)


def main() -> None:
    """Fetches the wheels and says how large they are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the other machine's Python; default: %(default)s")
    options = parser.parse_args()
    for wheel in fetch(options.folder, options.python):
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")


if __name__ == "__main__":
    main()
