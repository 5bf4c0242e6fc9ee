"""Named configurations (the last table of section 7)."""

from __future__ import annotations

from typing import Any

from automagic_core.config.config import Config


class OptimizationProfiles:
    """Each method returns a `Config`; fields given to it win over the profile."""

    @staticmethod
    def memory_optimized(**fields: Any) -> Config:
        """About 13 % of Adam's state: everything that can be factored is, and small arrays go to 8 bits too."""
        return Config(profile="memory_optimized", **fields)

    @staticmethod
    def balanced(**fields: Any) -> Config:
        """About 25 % of Adam's state: factored second moment, confidence for each element."""
        return Config(profile="balanced", **fields)

    @staticmethod
    def quality_optimized(**fields: Any) -> Config:
        """About 38 % of Adam's state: nothing factored, stronger gradient stages."""
        return Config(profile="quality_optimized", **fields)
