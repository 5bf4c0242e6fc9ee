"""Parts of timm that need torch alone: timm itself also wants a torchvision that fits torch."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def part_of_timm(name: str) -> Any:
    """A module such as ``timm.scheduler``; skips the test where timm is not installed."""
    spec = find_spec("timm") if "timm" not in sys.modules else sys.modules["timm"].__spec__
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    # Packages above it without their `__init__`, which imports everything.
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
    bare = {parent: ModuleType(parent) for parent in parents if parent not in sys.modules}
    for parent, module in bare.items():
        inner = parent.split(".")[1:]
        module.__path__ = [str(Path(folder, *inner)) for folder in spec.submodule_search_locations]
    sys.modules.update(bare)
    try:
        return import_module(name)
    finally:
        for parent in bare:
            del sys.modules[parent]
