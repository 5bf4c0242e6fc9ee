"""Where results go and what is said of the machine they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

FOLDER = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions and date, as they stand at the head of every result."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "backend": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "optax", "numpy", "torch", "bitsandbytes")},
        },
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def console() -> Console:
    """The terminal, or 130 columns where the output goes to a file, so that tables keep their headings."""
    return Console(width=None if sys.stdout.isatty() else 130)


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes a JSON file under `environment`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=2) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
