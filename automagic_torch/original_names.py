"""The names by which users of the original `Automagic_CameAMP_Improved_8Bit` know the optimizer."""

from __future__ import annotations

from typing import Any

from automagic_torch.optimizer import AutomagicCameAMP8bit

Automagic_CameAMP_Improved_8Bit = AutomagicCameAMP8bit
"""The original's name of `AutomagicCameAMP8bit`."""


def create_improved_8bit_optimizer(params: Any, profile: str | None = None, **overrides: Any) -> AutomagicCameAMP8bit:
    """Makes an optimizer from a profile; fields given beside it win over it.

    Args:
        params: as for `AutomagicCameAMP8bit`.
        profile: ``"memory_optimized"``, ``"balanced"``, ``"quality_optimized"`` or None.
        **overrides: `lr`, `layout` and any field of `automagic_core.Config`.
    """
    return AutomagicCameAMP8bit(params, profile=profile, **overrides)
