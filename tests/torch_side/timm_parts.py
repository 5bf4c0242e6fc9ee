"""Parts of timm that need torch alone: timm itself also wants a torchvision that fits torch."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


def part_of_timm(name: str) -> Any:
    """A module such as ``timm.scheduler``; skips the test where timm is not installed."""
    spec = find_spec("timm") if "timm" not in sys.modules else sys.modules["timm"].__spec__
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("timm is not installed")
    bare = ModuleType("timm")
    bare.__path__ = list(spec.submodule_search_locations)
    before = sys.modules.get("timm")
    sys.modules["timm"] = before or bare
    try:
        return import_module(name)
    finally:
        if before is None:
            del sys.modules["timm"]
