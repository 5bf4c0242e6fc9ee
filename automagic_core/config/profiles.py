"""Named configurations (docs/algorithm.md, section 7.2)."""

from __future__ import annotations

from typing import Any

from automagic_core.config.config import Config


class OptimizationProfiles:
    """Each method returns a `Config`; fields given to it win over the profile."""

    @staticmethod
    def memory_optimized(**fields: Any) -> Config:
        """About 13 % of Adam's state: factored moments, 8 bits for small arrays too, no stages."""
        return Config(profile="memory_optimized", **fields)

    @staticmethod
    def balanced(**fields: Any) -> Config:
        """About 26 % of Adam's state: a factored second moment, and no part that costs time and helps nowhere."""
        return Config(profile="balanced", **fields)

    @staticmethod
    def quality_optimized(**fields: Any) -> Config:
        """About 38 % of Adam's state: no factored moments, and stronger gradient stages."""
        return Config(profile="quality_optimized", **fields)
